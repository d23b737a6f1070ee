"""The one exception a user is meant to see."""


class StudyError(Exception):
    """Bad input or a missing piece: one line that says what is wrong, where, and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
