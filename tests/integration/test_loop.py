"""The whole dispatcher against a real Redis, with the worker played by hand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from byhand import PlayedWorker

from dispatcher.node import Node
from dispatcher.streams import producer
from dispatcher.streams.connection import Connection, Where
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.settings import LeaseSettings, LoopSettings, Settings
from scheduler.wire import Request

LIMIT_S = 10
"Nothing here takes longer on any machine; a test that does has hung."


@pytest.fixture
def keys(pool: str) -> Keys:
    return Keys("hg", pool)


@pytest.fixture
def settings(pool: str) -> Settings:
    return Settings(
        pool=pool,
        lease=LeaseSettings(leader_s=0.6, worker_s=1.0, beat_s=0.2),
        loop=LoopSettings(snapshot_every_s=0.2),
    )


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Connection]:
    connection = await Connection.connect(Where(url=redis_url))
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def dispatching(redis_url, settings, name="d1"):
    """A dispatcher that runs while the block does."""
    connection = await Connection.connect(Where(url=redis_url))
    node = Node(connection, settings, name=name)
    task = asyncio.create_task(node.run())
    try:
        yield node
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await connection.close()


async def enqueue(redis, keys, request_id, **fields):
    request = Request(id=request_id, model="llama", body=b"{}", **fields)
    call = producer.submit(keys, request, now=redis.now(), waiting_max=0, body_ttl_s=60)
    reply = await redis.call(call.function, call.keys, call.args)
    return reply[1].decode()


async def results(redis, keys, count, stream=None):
    """The pool's terminal records by id, once there are so many."""
    stream = stream or keys.results
    found, after = [], "0-0"
    async with asyncio.timeout(LIMIT_S):
        while len(found) < count:
            read = await redis.read({stream: after}, count=1000, block_s=1)
            found += read.get(stream, [])
            after = found[-1][0] if found else after
    assert len(found) == count, f"{len(found)} terminal records, wanted {count}"
    return {fields[b"id"].decode(): fields[b"outcome"].decode() for _, fields in found}


async def pending(redis, keys):
    return (await redis.command("XPENDING", keys.requests, DISPATCHER_GROUP))["pending"]


class TestDispatch:
    async def test_a_plain_xadd_is_served(self, redis_url, settings, redis, keys):
        """Model and body by hand at redis-cli are a request: handed over, finished, acknowledged."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            entry = await redis.command("XADD", keys.requests, "*", "model", "llama", "body", "{}")
            [held] = await worker.jobs()
            assert held.job.id == entry.decode()
            assert await worker.finish([held]) == [1]

            assert await results(redis, keys, 1) == {entry.decode(): "completed"}
            assert await pending(redis, keys) == 0

    async def test_many_are_served_once_each(self, redis_url, settings, redis, keys):
        """I1: what was enqueued before and after the start is all there in the end, once."""
        worker = PlayedWorker(redis, keys)
        for n in range(50):
            await enqueue(redis, keys, f"before-{n}")
        async with dispatching(redis_url, settings), worker.beating():
            for n in range(50):
                await enqueue(redis, keys, f"after-{n}")
            done = 0
            while done < 100:
                held = await worker.jobs()
                done += len(held)
                await worker.finish(held)

            assert len(await results(redis, keys, 100)) == 100
            assert await pending(redis, keys) == 0
