"""The one exception that is shown to a user without a traceback."""


class UserError(ValueError):
    """A user's mistake. The message says what is wrong, the value, and what to do.

    Any other exception, a plain `ValueError` among them, is a bug and keeps its traceback.
    """
