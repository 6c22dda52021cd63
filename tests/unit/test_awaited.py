"""Who waits for a record: each for himself, all woken at once."""

import asyncio

import pytest

from dispatcher.client.awaited import Awaited
from scheduler.errors import StreamError
from scheduler.wire.worker import Result

RECORD = Result(id="r", outcome="completed")


async def test_one_waiter_s_cancellation_is_not_the_others():
    """Who gives up waiting leaves the record to come, and those who still wait get it."""
    awaited = Awaited()
    impatient, patient = [asyncio.create_task(awaited.wait()) for _ in range(2)]
    await asyncio.sleep(0)

    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    assert not awaited.is_over
    awaited.bring(RECORD)

    assert impatient.cancelled()
    assert await patient is RECORD
    assert await awaited.wait() is RECORD


async def test_who_waits_comes_before_who_is_told():
    """A waiter has the next turn of the loop; callbacks and whatever else was ready come behind it."""
    awaited, order = Awaited(), []

    async def wait():
        await awaited.wait()
        order.append("waiter")

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    awaited.tell(lambda: order.append("told"))

    awaited.bring(RECORD)
    asyncio.get_running_loop().call_soon(order.append, "later")
    await waiting
    await asyncio.sleep(0)

    assert order == ["waiter", "told", "later"]


async def test_what_will_not_come_says_why():
    """To those who wait and to those who ask afterwards; who is told is told of that too."""
    awaited, told = Awaited(), asyncio.Event()
    waiting = asyncio.create_task(awaited.wait())
    await asyncio.sleep(0)

    awaited.give_up(StreamError("closed"))
    awaited.tell(told.set)

    for asking in (waiting, awaited.wait()):
        with pytest.raises(StreamError, match="closed"):
            await asking
    assert awaited.is_over
    assert awaited.record is None
    await asyncio.wait_for(told.wait(), 5)
