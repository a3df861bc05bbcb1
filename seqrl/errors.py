"""The one exception a user is meant to see."""


class UserError(Exception):
    """The input is at fault, not the program: ends the command with this one line and exit code 2.

    The message names the key, the file and line, or the sample, and says what to do.
    """
