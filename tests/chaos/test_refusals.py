"""A Redis that refuses what it did before, for a while: nothing is lost, and all goes on by itself."""

import asyncio
import contextlib

import pytest
from byhand import PlayedWorker
from hand import until
from servers import BINARIES, ask, serving

from dispatcher.node import Node
from dispatcher.streams import producer
from dispatcher.streams.connection import Connection, Where
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.settings import Settings
from scheduler.wire.client import Request

pytestmark = pytest.mark.chaos


@contextlib.asynccontextmanager
async def connected(port: int, **login: str):
    connection = await Connection.connect(Where(url=f"redis://127.0.0.1:{port}", **login))
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def leading(connection: Connection, pool: str):
    """A dispatcher that leads."""
    node = Node(connection, Settings(pool=pool), name="d1")
    task = asyncio.create_task(node.run())
    await until(lambda: node.is_leader)
    yield node
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("right", ["zadd", "fcall"])
@pytest.mark.parametrize("kind", list(BINARIES))
async def test_a_right_that_is_taken_and_given_back(kind, right, tmp_path, pool):
    """Whoever edits the users' rights by mistake loses no request: the move is said again until it is allowed."""
    keys = Keys("hg", pool)
    user = "user dispatcher on >s3cret ~* &* +@all"
    with serving(BINARIES[kind], tmp_path, user, "user default on nopass ~* &* +@all") as port:
        login = {"username": "dispatcher", "password": "s3cret"}
        async with (
            connected(port) as redis,
            connected(port, **login) as theirs,
            leading(theirs, pool),
        ):
            ask(port, "ACL", "SETUSER", "dispatcher", f"-{right}")
            request = Request(id="r1", model="llama", body=b"{}")
            call = producer.submit(keys, request, now=redis.now(), waiting_max=0, body_ttl_s=60)
            await redis.call(call.function, call.keys, call.args)
            await until(lambda: _holds(redis, keys))
            await until(lambda: right in str(ask(port, "ACL", "LOG")))
            ask(port, "ACL", "SETUSER", "dispatcher", f"+{right}")

            async with (played := PlayedWorker(redis, keys)).beating():
                assert await played.finish(await played.jobs()) == [1]


async def _holds(redis: Connection, keys: Keys) -> bool:
    """Whether the dispatcher has read a request that has not ended."""
    return (await redis.command("XPENDING", keys.requests, DISPATCHER_GROUP))["pending"] == 1
