"""A worker's inbox on a real Redis: what is read by one task and taken by two is passed on once, and all of it."""

import asyncio

import pytest

from dispatcher.streams.connection import Connection, Where
from scheduler import codec
from scheduler.keys import Keys
from scheduler.wire import PATHS, Job
from workers.inbox import Inbox

JOBS = 300


@pytest.fixture
async def redis(redis_url):
    connection = await Connection.connect(Where(url=redis_url))
    yield connection
    await connection.close()


def job(number):
    """With an empty body: its claim check must be fetched, and others go on meanwhile."""
    return Job(
        id=f"j{number}",
        entry="0-1",
        attempt=1,
        epoch=1,
        model="m",
        path=PATHS[0],
        enqueued_at=0.0,
        decided_at=0.0,
    )


async def test_two_takers_pass_every_job_on_once(redis, pool):
    """The reader and the adopter take at the same time; no job is dropped between them and none comes twice."""
    keys = Keys("hg", pool)
    inbox = Inbox(redis, keys, "e0", "w0")
    await inbox.open()
    seen: list[str] = []

    async def take():
        arrivals = await inbox.take(1, lambda *_: None, lambda name, _: name in seen)
        seen.extend(arrival.held.job.id for arrival in arrivals)

    async def reader():
        while len(seen) < JOBS:
            await inbox.read(1)
            await take()

    async def adopter():
        while len(seen) < JOBS:
            await inbox.adopt()
            await take()

    async def producer():
        for number in range(JOBS):
            await redis.add(keys.jobs("e0"), codec.encode(job(number)))

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for task in (reader, adopter, producer):
            group.create_task(task())

    assert sorted(seen) == sorted(f"j{number}" for number in range(JOBS))
