"""Slots that clients take in fair turns."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """At most `slots` holders at a time. The waiting client that has used the least goes next.

    A client's use is the sum of the costs of its turns. One that was idle starts level with the
    client that was served last, so idling saves up no claim (start-time fair queueing, Goyal et
    al. 1996).
    """

    def __init__(self, slots: int):
        self.free = slots
        self._waiting: dict[str, deque[tuple[float, asyncio.Future[None]]]] = {}
        self._used: dict[str, float] = {}
        self._level = 0.0  # use of the client that was served last, before its turn

    @asynccontextmanager
    async def take(self, client: str, cost: float) -> AsyncIterator[None]:
        """Wait for a slot and hold it while the block runs."""
        await self.enter(client, cost)
        try:
            yield
        finally:
            self.leave()

    async def enter(self, client: str, cost: float) -> None:
        """Wait for a slot, which is held until `leave`."""
        granted = asyncio.get_running_loop().create_future()
        if client not in self._waiting:
            self._waiting[client] = deque()
            self._used[client] = max(self._used.get(client, 0.0), self._level)
        self._waiting[client].append((cost, granted))
        self._serve()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # a slot came in the same moment
                self.leave()
            raise

    def leave(self) -> None:
        self.free += 1
        self._serve()

    def _serve(self) -> None:
        while self.free and self._waiting:
            client = min(self._waiting, key=self._used.__getitem__)
            cost, granted = self._waiting[client].popleft()
            if not granted.done():  # a waiter that was cancelled is skipped
                granted.set_result(None)
                self.free -= 1
                self._level = self._used[client]
                self._used[client] += cost
            if not self._waiting[client]:
                del self._waiting[client]
