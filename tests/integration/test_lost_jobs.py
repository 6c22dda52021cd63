"""A job that leaves the dispatcher and never reaches its worker: somebody took it from the stream and let it fall."""

import asyncio

import inside
import pytest
from hand import until

from scheduler import codec
from scheduler.keys import WORKER_GROUP
from scheduler.wire.dispatcher import Decision
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings


@pytest.fixture
async def client(redis_url, pool):
    """Of a dispatcher, a worker and one engine."""
    async with (
        Emulator(EmulatorSettings(time_scale=20.0)) as engine,
        inside.served(engine.url, redis_url=redis_url, pool=pool) as one,
    ):
        yield one


async def served(client, number):
    body = {"model": "emulated", "prompt": f"river {number}", "max_tokens": 5}
    async with asyncio.timeout(30):
        return await (await client.submit(body, id=f"r{number}", max_attempts=1))


async def test_a_job_that_nobody_has_is_taken_back(client):
    """The worker says what it holds; the job goes to it once more, and its only attempt is not spent."""
    await served(client, 1)
    jobs = client.keys.jobs("e0")
    answers = []
    async with asyncio.TaskGroup() as group:
        # Whoever waits in the worker's group is handed what comes next, in turn.
        thieves = [group.create_task(thief(client, jobs)) for _ in range(3)]
        while not all(one.done() for one in thieves):
            numbers = range(len(answers) + 2, len(answers) + 12)
            answers += [group.create_task(served(client, number)) for number in numbers]
            await asyncio.wait(answers)

    assert all(answer.result().record.outcome == "completed" for answer in answers)

    async def all_told():
        log = await client.connection.entries(client.keys.decisions)
        decisions = [codec.decode(Decision, fields) for _, fields in log]
        found = [one for one in decisions if one.kind == "reclaimed"]
        return found if len(found) >= 3 else None

    reclaimed = await until(all_told)
    assert [one.reason for one in reclaimed] == ["e0 does not have it"] * 3


async def thief(client, jobs):
    """Takes one job and says in the same breath that it is done: it pends nowhere, where it would be found."""
    words = ("XREADGROUP", "GROUP", WORKER_GROUP, "thief", "COUNT", 1, "BLOCK", 1000, "NOACK")
    while not await client.connection.command(*words, "STREAMS", jobs, ">"):
        pass
