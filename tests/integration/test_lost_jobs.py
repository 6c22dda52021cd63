"""A job that leaves the dispatcher and never reaches its worker: somebody took it from the stream and let it fall."""

import asyncio
import contextlib

import pytest

from dispatcher.client import Client
from dispatcher.node import Node
from dispatcher.streams.connection import Connection, Where
from scheduler import codec
from scheduler.keys import WORKER_GROUP
from scheduler.settings import (
    EngineAddress,
    LeaseSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
)
from scheduler.wire.dispatcher import Decision
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings
from workers.worker import Worker


@pytest.fixture
async def client(redis_url, pool):
    """Of a dispatcher, a worker and one engine."""
    async with Emulator(EmulatorSettings(time_scale=20.0)) as engine:
        settings = Settings(
            pool=pool,
            redis=RedisSettings(url=redis_url),
            lease=LeaseSettings(leader_s=3.0, worker_s=2.0, beat_s=0.1),
            worker=WorkerSettings(
                engines=(EngineAddress(name="e0", url=engine.url),), probe_s=0.1, drain_s=1.0
            ),
        )
        connection = await Connection.connect(Where(url=redis_url))
        worker = Worker(settings)
        dispatching = asyncio.create_task(Node(connection, settings, name="d").run())
        working = asyncio.create_task(worker.run(lambda: None))
        async with Client(redis=redis_url, pool=pool) as one:
            yield one
        worker.stop()
        await working
        dispatching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await dispatching
        await connection.close()


async def served(client, number):
    body = {"model": "emulated", "prompt": f"river {number}", "max_tokens": 5}
    async with asyncio.timeout(30):
        return await (await client.submit(body, id=f"r{number}", max_attempts=1))


async def test_a_job_that_nobody_has_is_taken_back(client):
    """The worker says what it holds; the job goes to it once more, and its only attempt is not spent."""
    await served(client, 1)
    jobs = client.keys.jobs("e0")
    async with asyncio.TaskGroup() as group:
        # Whoever waits in the worker's group is handed what comes next, in turn.
        for _ in range(3):
            group.create_task(thief(client, jobs))
        answers = [group.create_task(served(client, number)) for number in range(2, 12)]

    assert all(answer.result().record.outcome == "completed" for answer in answers)
    log = await client.connection.entries(client.keys.decisions)
    decisions = [codec.decode(Decision, fields) for _, fields in log]
    reclaimed = [one for one in decisions if one.kind == "reclaimed"]
    assert {one.reason for one in reclaimed} == {"e0 does not have it"}
    assert len(reclaimed) == 3


async def thief(client, jobs):
    """Takes one job and says that it is done."""
    entries = []
    while not entries:
        read = await client.connection.read_group(
            WORKER_GROUP, "thief", [jobs], count=1, block_s=1.0
        )
        entries = read.get(jobs, [])
    await client.connection.command("XACK", jobs, WORKER_GROUP, entries[0][0])
