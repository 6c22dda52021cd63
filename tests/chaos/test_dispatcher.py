"""Dispatchers and Redis killed and frozen while work is in flight: nothing is lost, nothing ends twice."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from byhand import PlayedWorker

from dispatcher.local import Server
from dispatcher.streams import dispatch, producer
from dispatcher.streams.connection import Connection, Where
from scheduler.errors import StreamError
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.client import Request

pytestmark = pytest.mark.chaos

LEASE_S = 0.6
LIMIT_S = 30
ENVIRONMENT = {
    "HEADGATE_LEASE__LEADER_S": str(LEASE_S),
    "HEADGATE_LEASE__WORKER_S": "2",
    "HEADGATE_LEASE__BEAT_S": "0.2",
    "HEADGATE_LOG__LEVEL": "warning",
}


@pytest.fixture
def server(tmp_path: Path):
    """A Redis of this test's own, to be killed."""
    with Server(directory=tmp_path) as running:
        yield running


@pytest.fixture
def keys(pool: str) -> Keys:
    return Keys("hg", pool)


@pytest.fixture
async def redis(server) -> AsyncIterator[Connection]:
    connection = await Connection.connect(Where(url=server.url))
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def dispatcher(url, pool, name):
    """A dispatcher process that runs."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("headgate")),
        "dispatcher",
        *("--redis", url, "--pool", pool, "--node", name),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | ENVIRONMENT,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            assert json.loads(await process.stdout.readline())["node"] == name
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        async with asyncio.timeout(LIMIT_S):
            await process.wait()


async def leads(redis, keys, name):
    """Wait until this node has the lease."""
    async with asyncio.timeout(LIMIT_S):
        while await redis.command("HGET", keys.leader, "node") != name.encode():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def enqueue(redis, keys, ids):
    await redis.batch(
        [
            producer.submit(
                keys,
                Request(id=one, model="llama", body=b"{}"),
                now=redis.now(),
                waiting_max=0,
                body_ttl_s=60,
            )
            for one in ids
        ]
    )


async def serve(worker, redis, keys, total):
    """Finish jobs until so many requests have ended in all; Redis may go away meanwhile."""
    held = []
    async with asyncio.timeout(LIMIT_S):
        while True:
            with contextlib.suppress(StreamError):
                held += await worker.pull(block_s=0.1)
                await worker.finish(held)
                held.clear()
                if await redis.command("XLEN", keys.results) >= total:
                    return


async def each_ended_once(redis, keys, count):
    """I2: exactly one terminal record each, and nothing pending."""
    ended = [fields[b"id"] for _, fields in await redis.entries(keys.results)]
    assert len(ended) == len(set(ended)) == count
    summary = await redis.command("XPENDING", keys.requests, DISPATCHER_GROUP)
    assert summary["pending"] == 0


class TestLeader:
    async def test_killed(self, server, redis, keys):
        """SIGKILL in the middle of the work: the standby goes on with what waits and what is held."""
        worker = PlayedWorker(redis, keys)
        async with (
            worker.beating(),
            dispatcher(server.url, keys.pool, "d1") as first,
            dispatcher(server.url, keys.pool, "d2"),
        ):
            await leads(redis, keys, "d1")
            await enqueue(redis, keys, [f"a{n}" for n in range(300)])
            await serve(worker, redis, keys, 50)
            first.kill()
            await enqueue(redis, keys, [f"b{n}" for n in range(300)])
            await serve(worker, redis, keys, 600)
            await each_ended_once(redis, keys, 600)

    async def test_frozen_and_thawed(self, server, redis, keys):
        """A leader frozen past its lease writes nothing when it wakes, and what it had read is found."""
        worker = PlayedWorker(redis, keys)
        async with (
            worker.beating(),
            dispatcher(server.url, keys.pool, "d1") as first,
            dispatcher(server.url, keys.pool, "d2"),
        ):
            await leads(redis, keys, "d1")
            await enqueue(redis, keys, ["warm"])
            await serve(worker, redis, keys, 1)
            first.send_signal(signal.SIGSTOP)
            await enqueue(redis, keys, [f"swallowed{n}" for n in range(20)])
            await leads(redis, keys, "d2")
            await enqueue(redis, keys, [f"later{n}" for n in range(20)])
            await serve(worker, redis, keys, 21)
            first.send_signal(signal.SIGCONT)
            await enqueue(redis, keys, [f"last{n}" for n in range(20)])
            await serve(worker, redis, keys, 61)

            await each_ended_once(redis, keys, 61)
            assert await redis.command("HGET", keys.leader, "node") == b"d2"
            assert first.returncode is None

    async def test_resigns_at_once(self, server, redis, keys):
        """SIGTERM ends the lease, and the process exits 0."""
        async with dispatcher(server.url, keys.pool, "d1") as first:
            await leads(redis, keys, "d1")
            first.terminate()
            assert await first.wait() == 0
        reply = await redis.batch([dispatch.lead(keys, "d2", ttl_s=1)])
        assert reply[0][0] > 0


class TestRedis:
    async def test_killed_and_restarted(self, server, redis, keys, tmp_path):
        """kill -9 with the append-only file: what was accepted before is served after, once each."""
        worker = PlayedWorker(redis, keys)
        async with worker.beating(), dispatcher(server.url, keys.pool, "d1"):
            await leads(redis, keys, "d1")
            await enqueue(redis, keys, [f"a{n}" for n in range(200)])
            await serve(worker, redis, keys, 50)
            os.kill(server.pid, signal.SIGKILL)
            async with asyncio.timeout(LIMIT_S):
                await asyncio.to_thread(server.stop)
                server.start()
            await serve(worker, redis, keys, 200)
            await enqueue(redis, keys, [f"b{n}" for n in range(50)])
            await serve(worker, redis, keys, 250)

            await each_ended_once(redis, keys, 250)

    async def test_replies_are_lost_again_and_again(self, server, redis, keys):
        """What Redis did and could not say loses no request and repeats no move, on either side."""
        async with (
            losing(server.url) as line,
            joined(line.url, keys) as worker,
            worker.beating(),
            dispatcher(line.url, keys.pool, "d1"),
        ):
            await leads(redis, keys, "d1")
            line.chance = 1 / 7
            for round_ in range(20):
                await enqueue(redis, keys, [f"r{round_}-{n}" for n in range(20)])
                with contextlib.suppress(StreamError):
                    await worker.finish(await worker.pull(block_s=0.01))
            await serve_all(worker, redis, keys, 400)
            line.chance = 0.0

            await each_ended_once(redis, keys, 400)
            assert line.lost >= 20


class LosingLine:
    """Between a client and Redis; of the server's replies it loses some by chance, and the connection with each.

    Not every so-manieth: who says the same at each beginning would be stopped at the same word for ever.
    """

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("redis://").partition("/")[0].partition(":")
        self._host, self._port = host, int(port)
        self.url = ""
        self.chance = 0.0
        self.lost = 0
        self._rng = random.Random(7)

    async def carry(self, reader, writer) -> None:
        """One connection, until either side or we end it."""
        there, back = await asyncio.open_connection(self._host, self._port)
        ways = [
            asyncio.create_task(self._forth(reader, back)),
            asyncio.create_task(self._back(there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.close()
            back.close()

    async def _forth(self, reader, writer) -> None:
        while data := await reader.read(65_536):
            writer.write(data)

    async def _back(self, reader, writer) -> None:
        while data := await reader.read(65_536):
            if self._rng.random() < self.chance:
                self.lost += 1
                return
            writer.write(data)


@contextlib.asynccontextmanager
async def losing(url: str) -> AsyncIterator[LosingLine]:
    line = LosingLine(url)
    async with await asyncio.start_server(line.carry, "127.0.0.1", 0) as listening:
        line.url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}/0"
        yield line


@contextlib.asynccontextmanager
async def joined(url: str, keys: Keys) -> AsyncIterator[PlayedWorker]:
    """A worker with a connection of its own."""
    connection = await Connection.connect(Where(url=url))
    yield PlayedWorker(connection, keys)
    await connection.close()


async def serve_all(worker, redis, keys, total):
    """As `serve`, and also what a lost reply left pending with the played worker itself."""
    stream = keys.jobs(worker.endpoint)
    async with asyncio.timeout(LIMIT_S):
        while await redis.command("XLEN", keys.results) < total:
            with contextlib.suppress(StreamError):
                await worker.pull(block_s=0.1)
            mine = await redis.history(WORKER_GROUP, "played", stream, after="0-0", count=1000)
            with contextlib.suppress(StreamError):
                await worker.finish(worker.held(mine))
