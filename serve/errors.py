"""The exception that becomes an HTTP error."""

import math


class RefusedError(Exception):
    """A request that is not carried out.

    `status` is the HTTP status, `retry_after` the seconds to wait before a retry, rounded up to
    whole ones, and `param` the field of the request that is wrong.
    """

    def __init__(
        self,
        message: str,
        status: int,
        retry_after: float | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.retry_after = retry_after if retry_after is None else max(1, math.ceil(retry_after))
