"""A worker's inbox on a real Redis: what is read by one task and taken by two is passed on once, and all of it."""

import asyncio

import pytest

from dispatcher.streams.connection import Connection, Where
from scheduler import codec
from scheduler.errors import StreamError
from scheduler.keys import WORKER_GROUP, Keys
from scheduler.wire.dispatcher import Job
from scheduler.wire.words import PATHS
from workers.inbox import BEHIND_S, Inbox

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
        arrivals = await inbox.take(1, lambda *_: None, lambda job: job.id in seen)
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


async def test_what_was_in_a_lost_reply_is_read_again(redis, pool):
    """The server has given it out, and nobody else will ever get it; until it is here nothing is said of its time."""
    keys = Keys("hg", pool)
    inbox = Inbox(redis, keys, "e0", "w0")
    await inbox.open()
    reading = asyncio.create_task(inbox.read(10))
    clients = []
    while len(clients) != 1:
        found = (await redis.command("CLIENT", "LIST")).decode().splitlines()
        clients = [line for line in found if "cmd=xreadgroup" in line and "flags=b" in line]
    await redis.command("CLIENT", "KILL", "ID", clients[0].split()[0].removeprefix("id="))
    with pytest.raises(StreamError):
        await reading
    # The reply that did not come: the entry stands in our own name.
    entry = await redis.add(keys.jobs("e0"), codec.encode(job(1)))
    await redis.command(
        *("XREADGROUP", "GROUP", WORKER_GROUP, "w0", "STREAMS", keys.jobs("e0"), ">")
    )
    assert inbox.read_at is None

    await inbox.read(10)
    arrivals = await inbox.take(1, lambda *_: None, lambda *_: False)

    assert [arrival.held.job.id for arrival in arrivals] == ["j1"]
    assert inbox.read_at is None or inbox.read_at <= int(entry.partition("-")[0]) / 1e3


async def test_what_names_no_job_does_not_stay(redis, pool):
    """Nobody could end it: the endpoint would never be empty, and a drain wait for ever."""
    keys = Keys("hg", pool)
    inbox = Inbox(redis, keys, "e0", "w0")
    await inbox.open()
    await redis.add(keys.jobs("e0"), {"by": "hand"})

    await inbox.read(10)
    arrivals = await inbox.take(1, lambda *_: None, lambda *_: False)

    assert arrivals == []
    assert await redis.command("XLEN", keys.jobs("e0")) == 0
    assert await redis.oldest_pending(keys.jobs("e0"), WORKER_GROUP) == ""


async def test_how_far_it_has_read_goes_on_while_nothing_comes(redis, pool):
    """Each empty wait says that there was nothing; a job says when it was written."""
    keys = Keys("hg", pool)
    inbox = Inbox(redis, keys, "e0", "w0")
    await inbox.open()
    entry = await redis.add(keys.jobs("e0"), codec.encode(job(1)))

    await inbox.read(10)
    assert inbox.read_at is None, "it is read, and not yet passed on"
    await inbox.take(1, lambda *_: None, lambda *_: False)
    assert inbox.read_at == int(entry.partition("-")[0]) / 1e3

    before = redis.now()
    await inbox.read(10)
    await inbox.take(1, lambda *_: None, lambda *_: False)
    assert before - BEHIND_S <= inbox.read_at <= redis.now()
