"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """Its message names the field or file, the value and the remedy. Command lines print it without traceback and exit
    with code 2."""
