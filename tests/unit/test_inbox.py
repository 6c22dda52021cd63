"""A worker's inbox on a real Redis: every job passed on once, with what belongs to it, and nothing that is somebody else's."""

import asyncio
import contextlib

import attempts
import msgspec
import pytest
import structlog
from hand import until

from dispatcher.streams import pages
from dispatcher.streams.connection import Connection, Where
from scheduler import codec
from scheduler.errors import StreamError
from scheduler.keys import WORKER_GROUP, Keys
from scheduler.wire.client import Control
from scheduler.wire.worker import Tokens
from workers import inbox as inboxes
from workers.body import NOTHING
from workers.halves import CLAIM
from workers.inbox import BEHIND_S, Inbox

JOBS = 100

EPOCH = 5


@pytest.fixture
async def redis(redis_url):
    connection = await Connection.connect(Where(url=redis_url))
    yield connection
    await connection.close()


def job(request_id="j1", **fields):
    """With an empty body: its claim check must be fetched, and others go on meanwhile."""
    return attempts.job(request_id, **{"entry": "0-1", "epoch": EPOCH} | fields)


class Box(Inbox):
    """The inbox of endpoint `e0` in the hands of a worker that has `known` in hand; the test hands it jobs."""

    def __init__(self, redis, pool, consumer="w0"):
        self.redis, self.keys = redis, Keys("hg", pool)
        self.jobs = self.keys.jobs("e0")
        self.known: set[str] = set()
        self.cancelled: list[tuple[str, str]] = []
        super().__init__(redis, self.keys, "e0", consumer)

    async def put(self, *jobs):
        """Hand these over; their entries."""
        return [await self.redis.add(self.jobs, codec.encode(one)) for one in jobs]

    async def taken(self, epoch=EPOCH):
        """What there is, as a worker of this epoch takes it."""
        return await self.take(epoch, lambda *word: self.cancelled.append(word), self.knows)

    async def joined(self, epoch):
        """Whoever has this epoch is the endpoint's worker."""
        await self.redis.command("HSET", self.keys.endpoint("e0"), "epoch", epoch)

    async def passed_on(self, *jobs):
        """These, handed over, read and taken."""
        await self.put(*jobs)
        await self.read(64)
        return await self.taken()

    def knows(self, job):
        return job.id in self.known

    async def pending(self):
        return (await self.redis.command("XPENDING", self.jobs, WORKER_GROUP))["pending"]

    async def waits(self):
        """Whether a read of its waits on the server."""
        return b"cmd=xreadgroup" in await self.redis.command("CLIENT", "LIST")

    async def given_to(self, consumer, count=100):
        """The server gives new entries to somebody, who is not heard of again."""
        words = ("GROUP", WORKER_GROUP, consumer, "COUNT", count, "STREAMS", self.jobs, ">")
        await self.redis.command("XREADGROUP", *words)


@pytest.fixture
async def box(redis, pool):
    opened = Box(redis, pool)
    await opened.open()
    await opened.joined(EPOCH)
    return opened


def ids(arrivals):
    return [arrival.held.job.id for arrival in arrivals]


class TestReading:
    async def test_two_takers_pass_every_job_on_once(self, box):
        """The reader and the adopter take at the same time; no job is dropped between them and none comes twice."""
        seen: list[str] = []

        async def take():
            arrivals = ids(await box.taken())
            box.known.update(arrivals)
            seen.extend(arrivals)

        async def reader():
            while len(seen) < JOBS:
                await box.read(1)
                await take()

        async def adopter():
            while len(seen) < JOBS:
                await box.adopt(len(box.known))
                await take()

        async def producer():
            for number in range(JOBS):
                await box.put(job(f"j{number}"))

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for task in (reader, adopter, producer):
                group.create_task(task())

        assert sorted(seen) == sorted(f"j{number}" for number in range(JOBS))

    async def test_no_more_is_read_than_there_is_room_for(self, box, monkeypatch):
        """The rest stays in the stream, for this worker or the next; and no reply is longer than a bound."""
        monkeypatch.setattr(inboxes, "READ_MAX", 3)
        await box.put(*(job(f"j{number}") for number in range(6)))

        await box.read(2)
        assert await box.pending() == 2
        assert ids(await box.taken()) == ["j0", "j1"]
        await box.read(64)
        assert ids(await box.taken()) == ["j2", "j3", "j4"]

    async def test_what_is_here_is_taken_before_more_is_read(self, box):
        """While Redis cannot say what belongs to the jobs, no more of them pile up."""
        await box.put(job("j1"), job("j2"))
        await box.read(1)

        await box.read(1)

        assert await box.pending() == 1

    async def test_a_lonely_one_is_announced(self, box, monkeypatch):
        """The moment it comes; of a wait in which nothing came nothing is said."""
        monkeypatch.setattr(inboxes, "BLOCK_S", 0.01)
        said = []
        await box.read(64, lambda: said.append(box.take_one(EPOCH, box.knows)))
        assert said == []
        [entry] = await box.put(job("j1", body=b"{}"))

        await box.read(64, lambda: said.append(box.take_one(EPOCH, box.knows)))

        assert ids(said) == ["j1"]
        assert (said[0].raw_body, said[0].held.job_entry) == (b"{}", entry)
        assert await box.taken() == [], "it was passed on"

    async def test_how_far_it_has_read_goes_on_while_nothing_comes(self, box, monkeypatch):
        """Each empty wait says that there was nothing; a job says when it was written."""
        [entry] = await box.put(job())

        await box.read(10)
        assert box.read_at is None, "it is read, and not yet passed on"
        await box.taken()
        assert box.read_at == int(entry.partition("-")[0]) / 1e3

        monkeypatch.setattr(inboxes, "BLOCK_S", 0.01)
        before = box.redis.now()
        await box.read(10)
        await box.taken()
        assert before - BEHIND_S <= box.read_at <= box.redis.now() - BEHIND_S

    async def test_one_taken_alone_says_as_much(self, box):
        """How far it has read, by the one that came."""
        [entry] = await box.put(job(body=b"{}"))
        await box.read(10)

        box.take_one(EPOCH, box.knows)

        assert box.read_at == int(entry.partition("-")[0]) / 1e3

    async def test_what_is_adopted_while_others_are_taken_stays(self, box, monkeypatch):
        """It is passed on the next time, and until then nothing is said of how far was read."""
        await box.put(job("j1"))
        await box.read(64)
        await box.put(job("j2"))
        await box.given_to("ghost")
        commands = box.redis.commands

        async def later(many):
            monkeypatch.undo()
            await box.adopt(0)
            return await commands(many)

        monkeypatch.setattr(box.redis, "commands", later)

        assert ids(await box.taken()) == ["j1"]
        assert box.read_at is None
        box.known.add("j1")
        assert ids(await box.taken()) == ["j2"]
        assert box.read_at is not None


class TestLost:
    async def test_what_was_in_a_lost_reply_is_read_again(self, box, monkeypatch):
        """The server has given it out, and nobody else will ever get it; until it is here nothing is said of its time."""
        monkeypatch.setattr(inboxes, "READ_MAX", 2)
        reading = asyncio.create_task(box.read(10))
        clients = []
        while len(clients) != 1:
            found = (await box.redis.command("CLIENT", "LIST")).decode().splitlines()
            clients = [line for line in found if "cmd=xreadgroup" in line and "flags=b" in line]
        await box.redis.command("CLIENT", "KILL", "ID", clients[0].split()[0].removeprefix("id="))
        with pytest.raises(StreamError):
            await reading
        # The reply that did not come: the entries stand in our own name, more than one page of them.
        names = [f"j{number}" for number in range(5)]
        await box.put(*map(job, names))
        await box.given_to("w0")
        assert box.read_at is None

        await box.read(10)
        assert ids(await box.taken()) == names
        assert box.read_at is None, "of others that came meanwhile nothing is known yet"

        [entry] = await box.put(job("j9"))
        await box.read(10)
        assert ids(await box.taken()) == ["j9"], "it reads on, and nothing again"
        assert box.read_at == int(entry.partition("-")[0]) / 1e3

    async def test_what_was_given_in_its_name_before_comes_first(self, box):
        """To a worker of this name that is gone: nobody else will ever get it, and what is new follows."""
        await box.redis.add(box.jobs, codec.encode(Control(action="cancel", id="j7")))
        await box.put(job("old", epoch=EPOCH - 1))
        await box.given_to("w0")
        await box.put(job("j1"))

        await box.read(10)
        assert await box.taken() == []
        assert box.cancelled == [("j7", "")]
        assert await box.redis.command("XLEN", box.jobs) == 1

        await box.read(10)
        assert ids(await box.taken()) == ["j1"]

    async def test_what_was_in_the_reply_to_a_read_broken_off_is_read_again(self, box):
        """By a worker that joins anew in the same process: the server may have given it out already."""
        reading = asyncio.create_task(box.read(10))
        await until(box.waits)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await box.put(job("j1"))
        await box.given_to("w0")

        await box.read(10)

        assert ids(await box.taken()) == ["j1"]

    async def test_what_another_was_given_is_adopted(self, box, monkeypatch):
        """All of it, page by page; and once only, though some of it was read as well."""
        monkeypatch.setattr(inboxes, "READ_MAX", 2)
        names = [f"j{number}" for number in range(5)]
        await box.put(*map(job, names))
        await box.given_to("ghost")
        await box.put(job("j5"))
        await box.read(10)

        await box.adopt(0)

        assert sorted(ids(await box.taken())) == [*names, "j5"]

    async def test_its_own_are_in_hand_already(self, box):
        """Where nobody else holds anything, nothing is claimed: each claim would bring all that runs here once more."""
        assert ids(await box.passed_on(job("j1"))) == ["j1"]

        for _ in range(3):
            await box.adopt(1)

        assert await box.taken() == []

    async def test_what_a_living_namesake_swallowed_is_found(self, box):
        """It stands in our name and we never saw it: there is more of it than we have, and not only for a moment."""
        await box.passed_on(job("j1"))
        await box.redis.add(box.jobs, codec.encode(Control(action="cancel", id="j1")))
        await box.given_to("w0")
        box.known.add("j1")

        await box.adopt(1)
        assert await box.taken() == [], "our own read may have it under way"
        await box.adopt(1)
        assert await box.taken() == []

        assert box.cancelled == [("j1", "")]
        assert await box.pending() == 1


class TestTaking:
    async def test_a_job_comes_with_its_body(self, box):
        """Its own, or what its claim check stands for; of one that has run out nothing."""
        await box.redis.command("SET", box.keys.body("long"), b'{"long":1}')

        arrivals = await box.passed_on(job("short", body=b"{}"), job("long"), job("gone"))

        assert {one.held.job.id: one.raw_body for one in arrivals} == {
            "short": b"{}",
            "long": b'{"long":1}',
            "gone": b"",
        }
        assert {one.trouble for one in arrivals} == {""}
        assert {one.written for one in arrivals} == {NOTHING}
        assert {one.held.endpoint for one in arrivals} == {"e0"}

    async def test_where_its_kv_is_comes_along(self, box):
        """As a claim check, too; where that has run out the job goes back: nobody knows any more."""
        await box.redis.command("SET", box.keys.kv("there"), b'{"at":1}')
        leg = {"leg": "decode", "kv_params": CLAIM, "body": b"{}"}

        there, gone = await box.passed_on(job("there", **leg), job("gone", **leg))

        assert (there.held.job.kv_params, there.trouble) == (b'{"at":1}', "")
        assert there.raw_body == b"{}"
        assert gone.held.job.kv_params == b""
        assert "claim check has run out" in gone.trouble

    async def test_what_it_has_in_hand_is_not_taken_again(self, box):
        """Entries stay pending until their jobs' ends, and may be read once more."""
        box.known.add("j1")

        assert ids(await box.passed_on(job("j1"), job("j2"))) == ["j2"]
        assert await box.pending() == 2

    async def test_epochs_keep_to_themselves(self, box):
        """Of an older one: given back long ago, and over with. Of a newer one: its own worker finds it where it is."""
        assert ids(await box.passed_on(job("old", epoch=4), job("new", epoch=6), job("j1"))) == [
            "j1"
        ]
        left = [fields[b"id"] for _, fields in await box.redis.entries(box.jobs)]
        assert left == [b"new", b"j1"]
        assert await box.pending() == 2

    async def test_words_to_cancel_are_passed_on_and_done_with(self, box):
        """Those that cannot be read as well: they name nobody."""
        word = codec.encode(Control(action="cancel", id="j7", reason="not wanted"))
        await box.redis.add(box.jobs, word)
        await box.redis.add(box.jobs, {"action": "dance"})

        with structlog.testing.capture_logs() as logs:
            assert await box.passed_on() == []

        assert (box.cancelled, logs) == ([("j7", "not wanted")], [])
        assert await box.redis.command("XLEN", box.jobs) == 0
        assert await box.pending() == 0

    async def test_a_predecessor_leaves_words_to_its_successor(self, box, redis, pool):
        """Thawed, it is handed one and does not know yet that it is fenced; whom the word was for finds it."""
        old = Box(redis, pool, consumer="old")
        await box.joined(EPOCH)
        await redis.add(box.jobs, codec.encode(Control(action="cancel", id="j7")))
        await old.read(64)
        assert await old.taken(EPOCH - 1) == []
        assert await box.pending() == 1

        await box.adopt(0)
        await box.taken()

        assert box.cancelled == [("j7", "")]
        assert await box.pending() == 0

    async def test_who_is_only_forgotten_hears_a_word_again(self, box):
        """Redis lost its epoch: it joins anew, and what it could not put away is its own again."""
        await box.joined(0)
        await box.redis.add(box.jobs, codec.encode(Control(action="cancel", id="j7")))
        await box.passed_on()
        assert await box.pending() == 1

        await box.joined(EPOCH)
        await box.read(64)
        await box.taken()

        assert box.cancelled == [("j7", "")] * 2
        assert await box.pending() == 0

    async def test_a_word_cancels_the_job_that_was_read_with_it(self, box):
        """It is not in hand yet when the word is heard. A job behind a word is another one, sent again under the same id."""
        word = codec.encode(Control(action="cancel", id="j1", reason="not wanted"))
        await box.put(job("j1", body=b"{}"))
        await box.redis.add(box.jobs, word)
        [one] = await box.passed_on()
        assert one.cancelled == "not wanted"

        await box.redis.add(box.jobs, word)
        [one] = await box.passed_on(job("j1", body=b"{}", attempt=2))
        assert one.cancelled is None

    async def test_what_names_no_job_does_not_stay(self, box):
        """Nobody could end it: the endpoint would never be empty, and a drain wait for ever."""
        await box.redis.add(box.jobs, {"by": "hand"})

        assert await box.passed_on() == []

        assert await box.redis.command("XLEN", box.jobs) == 0
        assert await box.pending() == 0

    async def test_what_can_be_named_goes_back(self, box):
        """A job of another version: whoever assigned it must hear of it."""
        strange = codec.encode(job("j1")) | {"enqueued_at": "yesterday"}
        [entry] = [await box.redis.add(box.jobs, strange)]

        with structlog.testing.capture_logs() as logs:
            [arrival] = await box.passed_on()

        assert "enqueued_at" in arrival.trouble
        assert [(one["event"], one["entry"]) for one in logs] == [("job_unreadable", entry)]
        held = arrival.held
        assert (held.endpoint, held.job_entry, held.job.entry) == ("e0", entry, "0-1")
        assert (held.job.id, held.job.attempt, held.job.epoch) == ("j1", 1, EPOCH)
        assert await box.pending() == 1, "handing it back is what ends it"


class TestTakingOne:
    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"epoch": 4}, id="of another epoch"),
            pytest.param({"body": b""}, id="its body is elsewhere"),
            pytest.param({"leg": "decode", "kv_params": CLAIM}, id="where its KV is is elsewhere"),
            pytest.param({"attempt": 2, "stream": True}, id="it may have been begun"),
            pytest.param({"id": "known"}, id="it is in hand"),
        ],
    )
    async def test_of_what_more_must_be_known_is_left_to_the_other(self, box, fields):
        """Nothing is taken in haste that cannot run at once."""
        box.known.add("known")
        await box.put(job(**{"body": b"{}"} | fields))
        await box.read(64)

        assert box.take_one(EPOCH, box.knows) is None

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"attempt": 2}, id="a retry without a log"),
            pytest.param({"stream": True}, id="a stream's first attempt"),
        ],
    )
    async def test_what_has_written_nothing_needs_no_look(self, box, fields):
        """It runs at once."""
        await box.put(job(body=b"{}", **fields))
        await box.read(64)

        assert box.take_one(EPOCH, box.knows).raw_body == b"{}"

    async def test_only_a_lonely_one(self, box):
        """Words to cancel, strange ones and two at once are the other's; and so is all while that is at it."""
        for entries in ([{"action": "cancel", "id": "j1"}], [{"by": "hand"}], 2 * [None]):
            for fields in entries:
                await box.redis.add(box.jobs, fields or codec.encode(job(body=b"{}")))
            await box.read(64)
            assert box.take_one(EPOCH, box.knows) is None
            await box.taken()
        await box.put(job("j3", body=b"{}"))
        await box.read(64)

        async with box._taking:
            assert box.take_one(EPOCH, box.knows) is None

        assert box.take_one(EPOCH, box.knows) is not None


def piece(index, text, **fields):
    return Tokens(attempt=1, index=index, text=text, **fields)


class TestResumed:
    async def _resumed(self, box, *parts, pieces=2, **fields):
        """What a second attempt finds of these parts of the log, whose end Redis counts as so many pieces."""
        entries = [
            await box.redis.add(
                box.keys.tokens("j1"), one if isinstance(one, dict) else codec.encode(one)
            )
            for one in parts
        ]
        await box.redis.command("HSET", box.keys.request("j1"), "tokens", pieces)
        again = {"attempt": 2, "stream": True, "body": b"{}"} | fields
        [arrival] = await box.passed_on(job("j1", **again))
        return arrival.written, entries

    async def test_it_goes_on_where_the_log_ends(self, box, monkeypatch):
        """All of its text, however many pages, how many tokens that was, and when the client saw the first."""
        monkeypatch.setattr(pages, "PAGE", 1)
        parts = piece(0, "Hel", output_tokens=2), piece(1, "lo", output_tokens=3)

        written, entries = await self._resumed(box, *parts)

        assert (written.text, written.pieces, written.output_tokens) == ("Hello", 2, 3)
        assert written.first_token_at == int(entries[0].partition("-")[0]) / 1e3
        assert written.is_plain

    async def test_who_has_written_nothing_begins_at_the_beginning(self, box):
        """The log is not even looked at."""
        written, _ = await self._resumed(box, piece(0, "x"), pieces=0)

        assert written is NOTHING

    async def test_without_a_stream_there_is_no_log(self, box):
        """Whatever lies there is another's."""
        written, _ = await self._resumed(box, piece(0, "x"), stream=False)

        assert written is NOTHING

    @staticmethod
    def _chunks(*tokens):
        return msgspec.json.encode([{"choices": [{"token_ids": [one]}]} for one in tokens]).decode()

    async def test_ids_are_known_where_every_part_has_them(self, box):
        """In their order; and such a log is more than text."""
        parts = piece(0, "a", chunks=self._chunks(5)), piece(1, "b", chunks=self._chunks(6, 7))

        written, _ = await self._resumed(box, *parts)

        assert written.ids == (5, 6, 7)
        assert not written.is_plain

    @pytest.mark.parametrize(
        "chunks",
        [
            pytest.param("", id="none"),
            pytest.param('[{"choices":[{}]}]', id="none among them"),
            pytest.param("[", id="no JSON"),
        ],
    )
    async def test_one_part_without_ids_makes_all_of_them_useless(self, box, chunks):
        """A prompt with a hole would be continued into something else."""
        parts = piece(0, "a", chunks=self._chunks(5)), piece(1, "b", chunks=chunks)

        written, _ = await self._resumed(box, *parts)

        assert written.ids == ()
        assert not written.is_plain

    @pytest.mark.parametrize(
        "parts",
        [
            pytest.param([], id="all is lost"),
            pytest.param([piece(1, "lo")], id="its beginning is lost"),
            pytest.param([piece(0, "a"), piece(2, "c", lost=1)], id="Redis says what it lost"),
            pytest.param([piece(0, "a"), {"by": "hand"}], id="one cannot be read"),
        ],
    )
    async def test_a_log_with_a_hole_is_begun_anew(self, box, parts):
        """Nothing may go on from there; and no entry that cannot be read ends the worker."""
        request = box.keys.request("j1")
        fence = ("state", "assigned", "endpoint", "e0", "attempt", 2)
        await box.redis.command("HSET", request, *fence)

        written, _ = await self._resumed(box, *parts)

        assert written is NOTHING
        assert await box.redis.entries(box.keys.tokens("j1")) == []
        assert await box.redis.command("HGET", request, "tokens") is None

    async def test_a_log_that_is_another_attempts_by_now_stays(self, box):
        """This one is over, and its worker has not heard of it."""
        request = box.keys.request("j1")
        await box.redis.command("HSET", request, "state", "running", "endpoint", "e0", "attempt", 3)

        await self._resumed(box, piece(1, "lo"))

        assert len(await box.redis.entries(box.keys.tokens("j1"))) == 1
