"""The worker's ear for KV events, with a publisher played by hand: what is lost, repeated, begun anew, or no message."""

import asyncio
import contextlib

import msgspec
import pytest
import zmq
import zmq.asyncio
from hand import until
from structlog.testing import capture_logs

from scheduler.prefix import BLOCK_TOKENS, blocks
from workers.kv_feed import END, Feed, Source, source_in
from workers.kv_mirror import Mirror


def ids(number):
    """A prompt of one block that no other number has."""
    return [number * 1000 + n for n in range(BLOCK_TOKENS)]


def block(number):
    return blocks(ids(number))[0]


def stored(number):
    return ["BlockStored", [number], None, ids(number), BLOCK_TOKENS]


class Publisher:
    """Sends what it is told to, and what it is told to lose it only keeps."""

    def __init__(self, *, replays=True):
        context = zmq.asyncio.Context.instance()
        self.news, self.past = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        self.kept = []
        for one in (self.news, self.past):
            one.setsockopt(zmq.LINGER, 0)
            one.bind("tcp://127.0.0.1:0")
        events, replay = (
            one.getsockopt_string(zmq.LAST_ENDPOINT) for one in (self.news, self.past)
        )
        self.source = Source(events, replay if replays else "")
        self.asked = 0
        self.answering = asyncio.create_task(self.answer())

    async def say(self, seq, *events, at=None, is_lost=False, payload=None):
        payload = payload or msgspec.msgpack.encode([at or 100.0 + seq, list(events), 0])
        self.kept.append((seq, payload))
        if not is_lost:
            await self.news.send_multipart([b"", seq.to_bytes(8, "big"), payload])

    async def answer(self):
        while True:
            client, _, first = await self.past.recv_multipart()
            self.asked += 1
            for seq, payload in self.kept:
                if seq >= int.from_bytes(first, "big"):
                    frames = [client, b"", b"", seq.to_bytes(8, "big"), payload]
                    await self.past.send_multipart(frames)
            await self.past.send_multipart([client, b"", b"", END, b""])

    def close(self):
        self.answering.cancel()
        self.news.close()
        self.past.close()


@contextlib.asynccontextmanager
async def heard(publisher):
    """A mirror that follows it."""
    mirror = Mirror()
    feed = Feed(mirror, name="e0")
    feed.turn_to(publisher.source)
    task = asyncio.create_task(feed.run())

    try:
        mirror.feed = feed
        yield mirror
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        publisher.close()


async def follows(publisher, mirror):
    """Return once it hears: the first message is said until it is there."""

    async def is_there():
        await publisher.news.send_multipart([b"", (0).to_bytes(8, "big"), publisher.kept[0][1]])
        return block(0) in mirror.teller.blocks

    await publisher.say(0, stored(0), is_lost=True)
    await until(is_there)


async def test_what_was_lost_is_asked_for():
    """A number is missing: the engine still has it."""
    publisher = Publisher()
    async with heard(publisher) as mirror:
        await follows(publisher, mirror)
        await publisher.say(1, stored(1), is_lost=True)
        await publisher.say(2, stored(2))

        await until(lambda: block(2) in mirror.teller.blocks)

        assert mirror.teller.blocks == {block(0), block(1), block(2)}


async def test_a_flood_leaves_the_others_their_turns(monkeypatch):
    """However much is there at once: tokens of answers come in between."""
    publisher = Publisher()
    turns, seen = 0, []
    hear = Mirror.hear
    monkeypatch.setattr(Mirror, "hear", lambda self, news: seen.append(turns) or hear(self, news))
    for number in range(300):
        await publisher.say(number, stored(number), is_lost=True)

    async with heard(publisher) as mirror:
        while block(299) not in mirror.teller.blocks:
            turns += 1
            await asyncio.sleep(0)

    assert len(set(seen)) >= 299


@pytest.mark.parametrize("replays", [True, False])
async def test_what_cannot_be_had_begins_anew(replays):
    """The engine has it no more, or repeats nothing: only what comes from now on is told."""
    publisher = Publisher(replays=replays)
    async with heard(publisher) as mirror:
        await follows(publisher, mirror)
        publisher.kept.clear()
        await publisher.say(5, stored(5))

        await until(lambda: block(5) in mirror.teller.blocks)

        assert mirror.teller.blocks == {block(5)}
        assert not mirror.teller.account().was_empty


async def test_a_repetition_changes_nothing():
    """The same number and moment again."""
    publisher = Publisher()
    async with heard(publisher) as mirror:
        await follows(publisher, mirror)
        await publisher.say(1, ["BlockRemoved", [0]])
        await until(lambda: block(0) not in mirror.teller.blocks)
        await publisher.say(0, stored(0), at=100.0)
        await publisher.say(2, stored(2))

        await until(lambda: block(2) in mirror.teller.blocks)

        assert mirror.teller.blocks == {block(2)}


async def test_another_engine_had_an_empty_cache():
    """Its numbers begin at 0, later by the clock: nothing of before is there, whatever is believed."""
    publisher = Publisher()
    async with heard(publisher) as mirror:
        await follows(publisher, mirror)
        publisher.kept.clear()
        await publisher.say(0, stored(7), at=500.0)

        await until(lambda: block(7) in mirror.teller.blocks)

        assert mirror.teller.blocks == {block(7)}
        assert mirror.teller.account().was_empty


async def test_an_engine_that_comes_back_is_asked_whether_it_is_the_same():
    """It does not know the last number that was heard: it is another, and has nothing."""
    publisher = Publisher()
    async with heard(publisher) as mirror:
        await follows(publisher, mirror)
        publisher.kept.clear()

        mirror.feed.turn_to(publisher.source)

        await until(lambda: not mirror.teller.blocks)
        assert mirror.teller.account().was_empty


async def test_a_failure_of_zeromq_does_not_end_the_listening(monkeypatch):
    """Where no socket can be had it is tried again, and as soon as there is one everything is heard."""
    publisher = Publisher()
    await publisher.say(0, stored(0), is_lost=True)
    few = zmq.asyncio.Context()
    few.set(zmq.MAX_SOCKETS, 2)
    taken = [few.socket(zmq.PUB) for _ in range(2)]
    monkeypatch.setattr(zmq.asyncio.Context, "_instance", few)
    with capture_logs() as said:
        async with heard(publisher) as mirror:
            await until(lambda: [one for one in said if one["event"] == "kv_events_lost"])
            for one in taken:
                one.close()

            await until(lambda: block(0) in mirror.teller.blocks)
    few.term()


async def test_a_message_that_cannot_be_read_is_a_lost_one():
    """And the next are heard."""
    publisher = Publisher()
    async with heard(publisher) as mirror:
        await follows(publisher, mirror)
        await publisher.say(1, payload=b"\xc1")
        await publisher.say(2, stored(2))

        await until(lambda: block(2) in mirror.teller.blocks)

        assert mirror.teller.blocks == {block(2)}


@pytest.mark.parametrize(
    ("page", "events"),
    [
        pytest.param(b"", None, id="nothing"),
        pytest.param(b"<html>", None, id="no JSON"),
        pytest.param(b"{}", None, id="nobody publishes"),
        pytest.param(b'{"0": {"enable_kv_cache_events": false}}', None, id="switched off"),
        pytest.param(
            b'{"0": {"enable_kv_cache_events": true, "endpoint": "tcp://10.0.0.7:5557"}}',
            "tcp://10.0.0.7:5557",
            id="its own address",
        ),
        pytest.param(
            b'{"0": {"enable_kv_cache_events": true, "endpoint": "tcp://*:1"},'
            b' "1": {"enable_kv_cache_events": true, "endpoint": "tcp://*:2"}}',
            None,
            id="two caches behind one URL",
        ),
    ],
)
def test_where_an_engine_publishes(page, events):
    """As its page says, from where we are."""
    source = source_in(page, "http://gpu:8000")

    assert (source and source.events) == events
