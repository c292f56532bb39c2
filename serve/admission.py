"""Admission control: how much work may be in flight, and when a rejected client should retry."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.errors import RefusedError
from serve.keys import Client
from serve.load import USUAL_STEPS, Load

MAX_RETRY_AFTER = 60.0  # seconds
SHARE = 0.5  # of the memory that one key may hold
RESERVED = 0.125  # of the queue, for keys that have nothing in flight


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
    """The load in flight at one ingress: at most `limit` usual edits, and `memory` bytes."""

    def __init__(self, limit: int, memory: int, pace: Pace):
        self.limit, self.most_memory, self.pace = limit, memory, pace
        self.in_flight = 0  # edits
        self.work, self.memory = 0.0, 0
        self.draining = False

    async def drain(self) -> None:
        """Refuse all that comes, and return when nothing is in flight."""
        self.draining = True
        while self.in_flight:
            await asyncio.sleep(0.1)

    @contextmanager
    def admit(self, client: Client | None, edits: int, load: Load) -> Iterator[None]:
        """Hold capacity for a request while the block runs, and charge it to the client's key.

        Raises `RefusedError`: 400 for a request that can never be admitted, 429 when the server is
        full or the key is over its limits, 503 when the service ends. A refused request is not
        charged.
        """
        if self.draining:
            raise RefusedError("the service is ending: retry later", 503, retry_after=5)
        self._check_possible(client, load)
        self._check_room(client, load)
        if client is not None:
            client.enter(load)
        self.in_flight += edits
        self.work += load.work
        self.memory += load.memory
        try:
            yield
        finally:
            self.in_flight -= edits
            self.work -= load.work
            self.memory -= load.memory
            if client is not None:
                client.leave(load)

    def _check_possible(self, client: Client | None, load: Load) -> None:
        most = self.limit if client is None else min(self.limit, client.slots, client.burst)
        if load.work > most:
            raise RefusedError(
                f"the request has the work of {load.work:.1f} edits of {USUAL_STEPS} steps; at most {most:g} fit: "
                "send fewer edits per request, fewer steps, or fewer previews",
                400,
            )
        if load.memory > SHARE * self.most_memory:
            raise RefusedError(
                f"the pictures of the request and their results need {_mb(load.memory)}; "
                f"at most {_mb(SHARE * self.most_memory)} fit: send smaller images, or fewer edits per request",
                400,
                param="image",
            )

    def _check_room(self, client: Client | None, load: Load) -> None:
        limit = self.limit
        if client is not None and client.work:
            limit -= RESERVED * self.limit
        excess = self.work + load.work - limit
        if excess > 0:
            raise RefusedError(
                f"server busy: the work of {self.work:.0f} of {limit:g} edits in flight; "
                "retry later or send fewer per request",
                429,
                retry_after=min(MAX_RETRY_AFTER, excess * self.pace.seconds),
            )
        of_client = 0 if client is None else client.memory
        if self.memory + load.memory > self.most_memory or of_client + load.memory > SHARE * self.most_memory:
            raise RefusedError(
                f"server busy: pictures of {_mb(self.memory)} in flight; retry later or send smaller images",
                429,
                retry_after=self.pace.seconds,
            )


def _mb(size: float) -> str:
    return f"{size / 2**20:.0f} MB"
