"""Exceptions that callers tell apart: a mistake of the user, and a GPU that has failed."""


class UserError(ValueError):
    """A user's mistake. The message says what is wrong, the value, and what to do.

    Any other exception, a plain `ValueError` among them, is a bug and keeps its traceback.
    """


class DeviceError(RuntimeError):
    """A GPU that does not work any more in this process.

    Every later call of the process fails as well: the process has to end, and the work has to be
    tried in another one.
    """
