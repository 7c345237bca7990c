"""The one exception of the command line that is the user's to fix."""


class UserError(Exception):
    """What the user gave cannot be used. The message is one sentence that says what was given and what is needed.

    The command line prints it to stderr and exits with code 2; it never reaches the user as a traceback.
    """
