"""Admission control: how many edits may be in flight, and when a rejected client should retry."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.errors import RefusedError
from serve.keys import Client

MAX_RETRY_AFTER = 60.0  # seconds


class Pace:
    """A moving average of the seconds between two completed edits."""

    WEIGHT = 0.1  # of the newest interval
    LONGEST = 10.0  # cap of an interval, so that an idle hour does not count

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.seconds = 1.0
        self._clock = clock
        self._last: float | None = None

    def tick(self) -> None:
        """Record a completed edit."""
        now = self._clock()
        if self._last is not None:
            self.seconds += self.WEIGHT * (min(now - self._last, self.LONGEST) - self.seconds)
        self._last = now


class Admission:
    """The edits in flight at one ingress: at most `limit`."""

    def __init__(self, limit: int, pace: Pace):
        self.limit, self.pace, self.in_flight = limit, pace, 0

    @contextmanager
    def admit(self, client: Client | None, edits: int) -> Iterator[None]:
        """Hold capacity for `edits` while the block runs, and charge them to the client's key.

        Raises `RefusedError` (429) when the server is full or the key is over its limits.
        """
        excess = self.in_flight + edits - self.limit
        if excess > 0:
            raise RefusedError(
                f"server busy: {self.in_flight} of {self.limit} edits in flight; retry later or send fewer per request",
                429,
                retry_after=min(MAX_RETRY_AFTER, excess * self.pace.seconds),
            )
        if client is not None:
            client.charge(edits - 1)  # the request guard has charged the first
            client.enter(edits)
        self.in_flight += edits
        try:
            yield
        finally:
            self.in_flight -= edits
            if client is not None:
                client.leave(edits)
