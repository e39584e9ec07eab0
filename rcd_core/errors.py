"""The one exception that means "the user can mend this": a message, no traceback, exit code 2."""


class UserError(ValueError):
    """Names the field or file, the value found, and the remedy. Command lines print it and exit with 2."""
