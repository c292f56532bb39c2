"""Fair turns, without a server."""

import asyncio

import pytest

from serve.turns import Turns


def order(*arrivals: tuple[str, float], slots: int = 1) -> str:
    """Return the clients in the order of their turns, when all arrive while a slot is taken."""

    async def run() -> str:
        turns, served = Turns(slots), []

        async def turn(client: str, cost: float) -> None:
            async with turns.take(client, cost):
                served.append(client)
                await asyncio.sleep(0)

        for _ in range(slots):
            await turns.enter("first", 0)
        tasks = [asyncio.create_task(turn(*arrival)) for arrival in arrivals]
        await asyncio.sleep(0)
        for _ in range(slots):
            turns.leave()
        await asyncio.gather(*tasks)
        assert turns.free == slots
        return "".join(served)

    return asyncio.run(run())


def test_clients_take_turns_in_any_order_of_arrival():
    assert order(*[("a", 1.0)] * 4, *[("b", 1.0)] * 2) == "ababaa"


def test_a_heavy_turn_counts_for_more():
    assert order(*[("a", 3.0)] * 3, *[("b", 1.0)] * 6) == "abbbabbba"


def test_a_client_keeps_its_own_order_and_slots_are_never_exceeded():
    async def run() -> None:
        turns, running, most, served = Turns(2), 0, 0, []

        async def turn(index: int) -> None:
            nonlocal running, most
            async with turns.take("a", 1.0):
                running += 1
                most = max(most, running)
                served.append(index)
                await asyncio.sleep(0.001)
                running -= 1

        await asyncio.gather(*(turn(index) for index in range(9)))
        assert (most, served) == (2, list(range(9)))

    asyncio.run(run())


def test_idling_saves_up_no_claim():
    async def run() -> str:
        turns, served = Turns(1), []

        async def turn(client: str) -> None:
            async with turns.take(client, 1.0):
                served.append(client)
                await asyncio.sleep(0)

        await turn("b")
        for _ in range(50):
            await turn("a")
        served.clear()
        await asyncio.gather(*(turn(client) for client in "abbbbaaa"))
        return "".join(served)

    assert asyncio.run(run()).startswith(("abab", "baba", "abba"))


@pytest.mark.parametrize("granted", [False, True])
def test_a_waiter_that_is_cancelled_holds_no_slot(granted):
    async def run() -> None:
        turns = Turns(1)
        await turns.enter("a", 1.0)
        waiter = asyncio.create_task(turns.enter("b", 1.0))
        await asyncio.sleep(0)
        if granted:
            turns.leave()  # the waiter has the slot, and has not run yet
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        if not granted:
            turns.leave()
        assert turns.free == 1
        await asyncio.wait_for(turns.enter("c", 1.0), 1)

    asyncio.run(run())
