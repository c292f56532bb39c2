"""The exception that becomes an HTTP error."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


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


def late() -> RefusedError:
    """Return the refusal of an edit that missed its deadline."""
    message = "the edit missed its deadline: allow more seconds, or ask for fewer steps"
    return RefusedError(message, 408, param="deadline_s")


@asynccontextmanager
async def before(deadline: float) -> AsyncIterator[None]:
    """Cancel the block at `deadline`, by time.monotonic, and raise `RefusedError` then."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            yield
    except TimeoutError as error:
        raise late() from error
