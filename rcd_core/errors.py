"""The exception for errors that the user can fix, and the note on the others that a training adds."""

STEP_NOTE = "optimiser steps done before this error: "  # begins a note on exceptions from the training loop


class UserError(ValueError):
    """Its message names the field or file, the value and the remedy. Command lines print it without traceback and exit
    with code 2."""
