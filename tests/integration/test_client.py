"""The client on a real server: nothing is missed, nothing is sent twice, every end is told as what it is."""

import asyncio
import contextlib
import os
import subprocess
import sys
from functools import partial
from typing import get_args

import msgspec
import pytest
from hand import until
from played import Played

from dispatcher.client import BlockingClient, Client, follower, records
from dispatcher.client.completion import completion
from dispatcher.local import Server
from scheduler.errors import (
    RequestCancelled,
    RequestFailed,
    RequestRejected,
    StreamError,
    UnknownRequestError,
    WireError,
)
from scheduler.settings import LimitSettings
from scheduler.wire.words import Outcome
from scheduler.wire.worker import Result

LIMIT_S = 20


@pytest.fixture
async def client(redis_url, pool):
    """A client nobody else is."""
    async with Client(redis=redis_url, pool=pool, name="tester") as one:
        yield one


def says(text, **more):
    return {"model": "llama", "prompt": text} | more


class TestSubmit:
    async def test_the_answer_comes_back(self, played, client):
        """Awaiting a handle gives the parsed answer and what Headgate knows of it."""
        handle = await client.submit(says("hello river"), ttft_s=0.5)

        answer = await handle

        assert (answer.text, answer.endpoint, answer.ttft_s) == ("hello river ", "a100-0", 0.25)
        assert answer.usage == {"completion_tokens": 2}
        assert (await handle.status()).outcome == "completed"

    async def test_a_result_before_the_wait_is_there(self, played, client):
        """The reply stream is read from before the submit, so a quick answer is not missed."""
        handles = [await client.submit(says(f"n{n}")) for n in range(20)]
        async for handle in client.results(handles):
            assert handle.is_done

        assert [(await handle).text for handle in handles] == [f"n{n} " for n in range(20)]

    async def test_the_same_id_is_one_request(self, played, client):
        """A second submit under an id gives the first one's answer, also when it has ended."""
        first = await (await client.submit(says("one"), id="same"))

        again = await (await client.submit(says("two"), id="same"))

        assert (first.text, again.text) == ("one ", "one ")
        assert len(await client.connection.entries(client.keys.requests)) == 1

    async def test_a_long_body_is_not_in_the_entry(self, played, client):
        """Above 1 KB the body rides beside the stream, and the answer is none the wiser."""
        text = "word " * 1000

        answer = await (await client.submit(says(text)))

        [(_, fields)] = await client.connection.entries(client.keys.requests)
        assert fields[b"body"] == b""
        assert fields[b"prompt_tokens"] == b"1250"
        assert len(fields[b"blocks"].split()) == 9
        assert answer.text == text

    async def test_the_settings_say_what_a_long_body_is(self, redis_url, pool):
        """`limits.inline_bytes`: 0 lets every body ride beside the stream, a million none."""
        for inline_bytes, is_inline in ((0, False), (10**6, True)):
            limits = LimitSettings(inline_bytes=inline_bytes)
            async with Client(redis=redis_url, pool=pool, limits=limits) as client:
                await client.submit(says("word " * 1000))

                [*_, (_, fields)] = await client.connection.entries(client.keys.requests)
                assert bool(fields[b"body"]) == is_inline

    async def test_many_in_one_round_trip(self, played, client):
        """More than a batch; each gets its own answer."""
        handles = await client.submit_many(says(f"n{n}") for n in range(300))

        assert {(await handle).text for handle in handles} == {f"n{n} " for n in range(300)}

    async def test_a_full_queue_says_when_to_come_back(self, redis_url, pool):
        """Refused at the door by an exact count, a tenth over the limit: so that the dispatcher can say who gives way.

        One of many is refused without harm to the others.
        """
        limits = LimitSettings(waiting_max=10)
        async with Client(redis=redis_url, pool=pool, limits=limits) as client:
            await client.submit_many([says(f"a{n}") for n in range(10)])
            await client.submit(says("b"))

            with pytest.raises(RequestRejected) as refused:
                await client.submit(says("c"))
            [turned_away] = await client.submit_many([says("d")])

            assert refused.value.retry_after_s > 0
            assert (await turned_away.record()).outcome == "rejected"

    @pytest.mark.parametrize(
        ("body", "wishes", "message"),
        [
            pytest.param(b"{", {}, "'body' is no JSON", id="no json"),
            pytest.param(b"[]", {}, "wanted an object", id="no object"),
            pytest.param(b"[" * 10_000, {}, "recursion", id="a pit"),
            pytest.param({}, {}, "'model' is None", id="no model"),
            pytest.param({"model": "m"}, {"ttft_s": -1.0}, "'ttft_ms' is '-1000'", id="promise"),
            pytest.param({"model": "m"}, {"id": "a b"}, "'id' is 'a b'", id="id"),
            pytest.param({"model": "m"}, {"path": "/x"}, "'path' is '/x'", id="path"),
        ],
    )
    async def test_what_can_never_be_served_is_refused_here(self, body, wishes, message):
        """The same rules as the dispatcher's, before anything is sent."""
        with pytest.raises(WireError, match=message):
            Client(redis="redis://nowhere", name="x").request(body, **wishes)


class TestEnds:
    async def test_every_bad_end_has_its_type(self, played, client):
        """A failed request raises its own error, with the reason of the record."""
        handle = await client.submit(says("x"), tenant="fail")

        with pytest.raises(RequestFailed, match="as the test wants") as failed:
            await handle

        assert failed.value.request_id == handle.id

    async def test_cancel(self, played, client):
        """Asking twice is fine; after the end there is nothing to cancel; an unknown id is said so."""
        handle = await client.submit(says("x"), tenant="hold")
        await played.is_holding.wait()

        assert await handle.cancel()
        assert (await handle.status()).is_cancelled
        await played.finish(played.held[0], outcome="cancelled")
        with pytest.raises(RequestCancelled):
            await handle
        assert not await handle.cancel()
        with pytest.raises(UnknownRequestError, match="'nobody'"):
            await client.cancel("nobody")

    async def test_closing_tells_who_waits(self, redis_url, pool):
        """A closed client's handles do not wait for ever."""
        async with Client(redis=redis_url, pool=pool) as client:
            handle = await client.submit(says("x"))
        with pytest.raises(StreamError, match="closed"):
            await handle

    @pytest.mark.parametrize("part", ["records", "follower"])
    async def test_who_is_cancelled_while_closing_learns_it(self, redis_url, pool, part):
        """The readers' own end is not taken for the cancel of whoever closes them."""
        async with Client(redis=redis_url, pool=pool) as client:
            await client.submit(says("x"))
            closing = asyncio.create_task(getattr(client, part).close())
            await asyncio.sleep(0)  # it waits for its readers now

            closing.cancel()

            with pytest.raises(asyncio.CancelledError):
                await closing


class TestStream:
    async def test_pieces_come_as_they_are_written(self, played, client):
        """The first piece is here before the last is written; joined they are the answer."""
        handle = await client.submit(says("a b c"), stream=True, tenant="hold")
        await played.is_holding.wait()
        [held] = played.held
        texts = aiter(handle)

        await played.say(held, 0, "first ")
        assert await anext(texts) == "first "
        await played.say(held, 1, "second ")
        assert await anext(texts) == "second "
        await played.finish(held, pieces=2)

        assert [text async for text in texts] == []

    async def test_the_log_can_be_read_again_from_any_place(self, played, client):
        """From the beginning after the end, and behind any piece."""
        handle = await client.submit(says("a b c"), stream=True)
        await handle

        pieces = [piece async for piece in handle.pieces()]
        rest = [piece.text async for piece in handle.pieces(after=pieces[0].entry)]

        assert "".join(piece.text for piece in pieces) == "a b c "
        assert rest == ["b ", "c "]

    @pytest.mark.parametrize("lost", [(1,), (1, 2), (0,)])
    async def test_a_hole_in_the_log_is_said(self, played, client, lost):
        """Redis without its last second: who read what it lost goes on, who reads it later is told of the gap."""
        handle = await client.submit(says("a b c d"), stream=True, tenant="hold")
        await played.holds(1)
        [held] = played.held
        texts = aiter(handle)
        for index, word in enumerate("abc"):
            await played.say(held, index, word)
            await anext(texts)

        log, command = client.keys.tokens(handle.id), client.connection.command
        entries = [entry for entry, _ in await client.connection.entries(log)]
        await command("XDEL", log, *entries[lost[0] :])
        await command("HSET", client.keys.request(handle.id), "tokens", lost[0])
        if lost[-1] == 2:
            await played.say(held, 3, "d")
            assert await anext(texts) == "d"
            await played.finish(held, pieces=4)
        else:
            await played.finish(held, pieces=3)

        assert [text async for text in texts] == []
        pieces = handle.pieces()
        for index in range(lost[0]):
            assert (await anext(pieces)).text == "abc"[index]
        with pytest.raises(StreamError, match=f"has lost {3 - lost[0]} pieces of request"):
            await anext(pieces)

    async def test_what_is_said_anew_is_not_spliced(self, played, client):
        """Redis lost what was read, and another attempt begins before it: who read that is told, the record is whole."""
        handle, texts, held = await self.read_and_lost(played, client, kept=1)
        second = await self.again(played, client, held, attempt=2)
        await played.say(second, 1, "other ")
        await played.finish(second, pieces=2)

        with pytest.raises(StreamError, match=rf"'{handle.id}' that were read already, and entry"):
            await anext(texts)

        assert (await handle).record.outcome == "completed"
        assert await whole(handle) == "a other "
        rest = handle.pieces(after=self.read[0])
        assert [piece.text async for piece in rest] == ["other "]

    async def test_nor_where_the_attempt_is_lost_as_well(self, played, client):
        """Its number is given anew, and it begins at the beginning."""
        _, texts, held = await self.read_and_lost(played, client, kept=0)
        anew = await self.again(played, client, held, attempt=1)
        await played.say(anew, 0, "other ")

        with pytest.raises(StreamError, match="says them anew"):
            await anext(texts)

    async def test_nor_for_who_goes_on_behind_what_is_lost(self, played, client):
        """Another reading knows nothing but the place, which is not there any more."""
        handle, texts, held = await self.read_and_lost(played, client, kept=1)
        second = await self.again(played, client, held, attempt=2)
        await played.say(second, 1, "other ")
        await played.finish(second, pieces=2)

        with pytest.raises(StreamError, match="says them anew"):
            await anext(handle.pieces(after=self.read[-1]))
        await texts.aclose()

    async def test_nor_by_an_answer_that_ends_before_it(self, played, client):
        """The end is said as well: the record is shorter than what was read."""
        _, texts, held = await self.read_and_lost(played, client, kept=1)
        second = await self.again(played, client, held, attempt=2)
        await played.finish(second, pieces=1)

        with pytest.raises(StreamError, match="says them anew"):
            await anext(texts)

    async def test_another_attempt_behind_what_is_lost_is_a_hole(self, played, client):
        """Redis lost some of it, and then again: nobody knows whether it goes on from what was read."""
        _, texts, held = await self.read_and_lost(played, client, kept=1)
        second = await self.again(played, client, held, attempt=2)
        await played.say(second, 3, "other ")

        with pytest.raises(StreamError, match="has lost 2 pieces"):
            await anext(texts)

    async def test_what_is_said_before_the_last_read_is_missed_aloud(self, played, client):
        """Redis lost what was read and its clock went back: what follows lies before it, where nobody reads on."""
        handle = await client.submit(says("a b"), stream=True, tenant="hold")
        await played.holds(1)
        [held] = played.held
        texts = aiter(handle)
        log, command = client.keys.tokens(handle.id), client.connection.command
        ahead = f"{round((client.connection.now() + 3600) * 1e3)}-0"
        await command("XADD", log, ahead, "attempt", 1, "index", 0, "pieces", 1, "text", "a ")
        assert await anext(texts) == "a "
        await command("DEL", log)
        await played.say(held, 0, "a ")
        await played.say(held, 1, "b ")
        await played.finish(held, pieces=2)

        with pytest.raises(StreamError, match=f"has lost entry {ahead} of request"):
            await anext(texts)

        assert await whole(handle) == "a b "

    async def test_what_passes_the_last_read_shows_what_lies_before_it(self, played, client):
        """The clock went back by less than the rest takes: its end lies behind what was read, its middle before."""
        handle = await client.submit(says("a b c"), stream=True, tenant="hold")
        await played.holds(1)
        [held] = played.held
        texts = aiter(handle)
        log, command = client.keys.tokens(handle.id), client.connection.command
        now_ms = round(client.connection.now() * 1e3)
        ahead, behind = f"{now_ms + 3_600_000}-0", f"{now_ms + 3_600_001}-0"
        await command("XADD", log, ahead, "attempt", 1, "index", 0, "pieces", 1, "text", "a ")
        assert await anext(texts) == "a "
        await command("DEL", log)
        await played.say(held, 0, "a ")
        await played.say(held, 1, "b ")
        await command("XADD", log, behind, "attempt", 1, "index", 2, "pieces", 1, "text", "c ")

        with pytest.raises(
            StreamError, match=f"1 pieces of request '{handle.id}' before entry {behind} lie"
        ):
            await anext(texts)

        await played.finish(held, pieces=3)
        assert await whole(handle) == "a b c "

    async def test_what_was_lost_unread_is_missed_by_who_read_what_came_before(
        self, played, client
    ):
        """Of two pieces that Redis lost one was read; the count of those in each entry shows the other."""
        handle = await client.submit(says("a b c"), stream=True, tenant="hold")
        await played.holds(1)
        [held] = played.held
        texts = aiter(handle)
        log, command = client.keys.tokens(handle.id), client.connection.command
        await played.say(held, 0, "a ")
        assert await anext(texts) == "a "
        await command("DEL", log)
        await command("HSET", client.keys.request(handle.id), "tokens", 0)
        await played.say(held, 2, "c ")

        with pytest.raises(StreamError, match="has lost 1 pieces of request"):
            await anext(texts)

    async def test_the_same_said_twice_is_read_once(self, played, client):
        """Redis lost a piece and its reply: the worker says it once more, and its reader has it."""
        _, texts, held = await self.read_and_lost(played, client, kept=2)
        await played.say(held, 2, "c ")
        await played.say(held, 3, "d ")
        await played.finish(held, pieces=4)

        assert [text async for text in texts] == ["d "]

    async def test_a_bad_end_needs_nothing_before_it(self, played, client):
        """Redis lost what was read, and the request ends without an answer: that is what its reader hears."""
        _, texts, held = await self.read_and_lost(played, client, kept=0)
        second = await self.again(played, client, held, attempt=2)
        await played.finish(second, outcome="failed", pieces=0)

        with pytest.raises(RequestFailed):
            await anext(texts)

    async def read_and_lost(self, played, client, *, kept):
        """A stream of which three pieces were read, and Redis has so many of them; its job."""
        handle = await client.submit(says("a b c"), stream=True, tenant="hold")
        await played.holds(1)
        [held] = played.held
        texts = aiter(handle)
        for index, word in enumerate(["a ", "b ", "c "]):
            await played.say(held, index, word)
            assert await anext(texts) == word
        log, command = client.keys.tokens(handle.id), client.connection.command
        self.read = [entry for entry, _ in await client.connection.entries(log)]
        await command("XDEL", log, *self.read[kept:])
        # Log and count are written in one move, and lost together.
        request = client.keys.request(handle.id)
        await command(*(("HSET", request, "tokens", kept) if kept else ("HDEL", request, "tokens")))
        return handle, texts, held

    async def again(self, played, client, held, *, attempt):
        """The job of its next attempt."""
        await client.connection.command(
            "HSET", client.keys.request(held.job.id), "attempt", attempt
        )
        job = msgspec.structs.replace(held.job, attempt=attempt)
        return msgspec.structs.replace(held, job=job)

    async def test_a_bad_end_is_raised_after_the_last_piece(self, played, client):
        """What came is given first, then how it ended."""
        handle = await client.submit(says("x"), stream=True, tenant="hold")
        await played.is_holding.wait()
        await played.say(played.held[0], 0, "half ")
        await played.finish(played.held[0], outcome="failed", pieces=1)
        came = []

        with pytest.raises(RequestFailed):  # noqa: PT012  the loop is the statement
            async for text in handle:
                came.append(text)  # noqa: PERF401  the raise must not lose it

        assert came == ["half "]

    async def test_a_request_without_a_log_gives_its_answer_at_once(self, played, client):
        """Iterating is right for both kinds."""
        handle = await client.submit(says("a b"))

        assert [text async for text in handle] == ["a b "]

    async def test_more_streams_than_readers(self, played, client):
        """Forty logs are followed by eight connections, none forgotten."""
        handles = [await client.submit(says("a b c"), stream=True) for _ in range(40)]

        async def whole(handle):
            return "".join([text async for text in handle])

        assert set(await asyncio.gather(*map(whole, handles))) == {"a b c "}
        assert len(client.follower._readers) <= follower.READERS_MAX

    async def test_one_more_stream_than_readers_does_not_wait_for_the_quiet(
        self, played, client, monkeypatch
    ):
        """Every reader waits on the server, for an hour if need be; who joins one is read at once."""
        monkeypatch.setattr(follower, "WAIT_S", 3600.0)
        quiet = [await self.begun(played, client) for _ in range(follower.READERS_MAX)]
        waiting = [asyncio.create_task(anext(texts)) for _, texts in quiet]

        async with asyncio.timeout(20):
            more = [await self.begun(played, client) for _ in range(4)]

        assert len(client.follower._readers) == follower.READERS_MAX
        for held, _ in (*quiet, *more):
            await played.finish(held, pieces=1)
        with pytest.raises(StopAsyncIteration):
            await waiting[0]
        await asyncio.gather(*waiting, return_exceptions=True)

    async def begun(self, played, client):
        """A stream that has said one word, so that its reader waits for the next."""
        handle = await client.submit(says("x"), stream=True, tenant="hold")
        await played.holds(len(played.held) + 1)
        texts = aiter(handle)
        first = asyncio.create_task(anext(texts))
        await played.say(played.held[-1], 0, "word")
        assert await first == "word"
        return played.held[-1], texts

    async def test_a_stream_that_is_over_holds_no_reader(self, played, client, monkeypatch):
        """At its end, or when nobody reads it any more, its reader waits for nothing on the server."""
        monkeypatch.setattr(follower, "WAIT_S", 3600.0)
        for _ in range(2 * follower.READERS_MAX):
            assert [text async for text in await client.submit(says("a"), stream=True)] == ["a "]
        left = (await client.submit(says("x"), stream=True, tenant="hold")).pieces(quiet_s=0.01)
        await anext(left)
        await left.aclose()

        async with asyncio.timeout(20):
            while len(client.follower._readers) > 1:  # noqa: ASYNC110  a task's end has no event
                await asyncio.sleep(0.01)


class TestAttach:
    async def test_after_the_end(self, played, client, redis_url, pool):
        """Another process finds the record where the hash says it lies."""
        await (await client.submit(says("done"), id="r1"))

        async with Client(redis=redis_url, pool=pool) as other:
            assert (await (await other.attach("r1"))).text == "done "

    async def test_before_the_end(self, played, client, redis_url, pool):
        """Another process waits on the first one's reply stream; two of them, two requests, one reader."""
        first = await client.submit(says("one"), id="r1", tenant="hold")
        await client.submit(says("two"), id="r2", tenant="hold")
        await played.is_holding.wait()
        async with Client(redis=redis_url, pool=pool) as other:
            handles = [await other.attach("r1"), await other.attach("r2"), await other.attach("r2")]

            await played.holds(2)
            for held in played.held:
                await played.finish(held)

            assert [(await handle).text for handle in handles] == ["one ", "two ", "two "]
        assert (await first).text == "one "

    async def test_one_that_a_hand_added(self, redis_url, pool, client):
        """An entry without id and reply stream is found by its entry id, its record on the shared stream."""
        parts = await Played.start(redis_url, pool)
        entry = await client.connection.add(
            client.keys.requests, {"id": "by-hand", "model": "llama", "body": '{"prompt":"hi"}'}
        )
        assert (await client.status(entry)).state == "queued"
        await parts.turn()

        assert (await (await client.attach("by-hand"))).text == "hi "
        await parts.close()

    async def test_nobody_knows_it(self, client):
        """An id that never was is an error, not an endless wait."""
        with pytest.raises(UnknownRequestError, match="'never'"):
            await client.attach("never")

    async def test_a_client_of_the_same_name_goes_on(self, played, redis_url, pool):
        """A client that died between submit and answer: its successor gets the answer once."""
        async with Client(redis=redis_url, pool=pool, name="job-7") as first:
            await first.submit(says("kept"), id="r1", tenant="hold")
            await played.is_holding.wait()
        async with Client(redis=redis_url, pool=pool, name="job-7") as second:
            handle = await second.submit(says("kept"), id="r1", tenant="hold")
            await played.finish(played.held[0])

            assert (await handle).text == "kept "
        assert len(await played.connection.entries(played.keys.requests)) == 1


class TestWeather:
    async def test_a_cut_connection_misses_nothing(self, played, client):
        """Every connection killed while it waits: it reads on from where it was."""
        handle = await client.submit(says("x"), tenant="hold")
        await played.is_holding.wait()
        await client.connection.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        await played.finish(played.held[0])

        assert (await handle).text == "x "

    async def test_what_redis_has_lost_is_not_waited_for(self, played, client):
        """After an outage who waits for what did not come back is told so; what did come back goes on."""
        names = ("lost", "lost-stream", "kept")
        handles = [
            await client.submit(says(one), id=one, tenant="hold", stream="stream" in one)
            for one in names
        ]
        await played.holds(3)
        reading = asyncio.create_task(anext(aiter(handles[1])))

        await client.connection.command("DEL", *map(client.keys.request, names[:2]))
        await client.connection.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(StreamError, match="has lost request 'lost'"):
                await handles[0].record()
            with pytest.raises(StreamError, match="has lost request 'lost-stream'"):
                await reading
            await played.finish(played.held[2])
            assert (await handles[2]).text == "kept "

    async def test_a_redis_emptied_while_it_runs(
        self, played, client, redis_url, pool, monkeypatch
    ):
        """No connection breaks, nobody is told: who waits looks now and then, and passes over what nobody has read yet."""
        monkeypatch.setattr(records, "LOOK_EVERY_S", 0.01)
        async with Client(redis=redis_url, pool=pool) as waiting:
            handles = [await waiting.submit(says(one), tenant="hold") for one in "ab"]
            await played.holds(2)

            await client.connection.command("FLUSHALL")
            entry = await client.connection.add(client.keys.requests, {"model": "x", "body": "{}"})
            unread = await waiting.attach(entry)

            async with asyncio.timeout(LIMIT_S):
                for handle in handles:
                    with pytest.raises(StreamError, match="has lost request"):
                        await handle.record()
            await waiting.records._look_for_all()
            assert not unread.is_done

    async def test_an_outage_is_said_once(self, tmp_path, pool, caplog):
        """By whichever of the readers notices it first, and not at every try."""
        caplog.set_level("INFO", logger="headgate.client")
        with Server(directory=tmp_path) as server:
            async with Client(redis=server.url, pool=pool) as client, asyncio.timeout(LIMIT_S):
                handles = [await client.submit(says("x"), stream=True) for _ in range(9)]
                streams = [asyncio.create_task(anext(aiter(one))) for one in handles]
                while len(client.follower._readers) < follower.READERS_MAX:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                server.stop()
                readers = client.follower._readers.values()
                await until(partial(_all_without, client.follower._outage, readers))
                assert caplog.text.count("cannot read replies") == 1

                for stream in streams:
                    stream.cancel()

    async def test_an_end_that_is_not_on_the_reply_stream_is_found(self, played, client):
        """A Redis that comes back with another clock writes records behind what was read: each is looked for."""
        handle = await client.submit(says("x"), tenant="hold")
        await played.holds(1)
        [reader] = client.follower._readers.values()
        reader.share[0].after = f"{10**15}-0"  # as far as the old clock had come
        command = client.connection.command
        await command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await until(partial(_is_reading, command))
        await played.finish(played.held[0])

        await command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        async with asyncio.timeout(LIMIT_S):
            assert (await handle).text == "x "

    async def test_the_rest_of_a_log_waits_for_redis(self, tmp_path, pool):
        """The record came just before Redis went: its text is as whole as that of any other outage."""
        with Server(directory=tmp_path) as server:
            played = await Played.start(server.url, pool)
            async with Client(redis=server.url, pool=pool) as client, asyncio.timeout(LIMIT_S):
                handle = await client.submit(says("one two three"), stream=True)
                await played.turn(block_s=1.0)
                await handle.record()
                server.stop()
                reading = asyncio.create_task(whole(handle))
                with pytest.raises(StreamError):
                    await client.status(handle.id)  # as often as redis-py tries by itself
                server.start()

                assert await reading == "one two three "
            await played.connection.close()

    async def test_leaving_while_redis_is_away(self, tmp_path, pool, caplog):
        """Readers between two tries end like any other."""
        with Server(directory=tmp_path) as server:
            async with Client(redis=server.url, pool=pool) as client:
                handle = await client.submit(says("x"), stream=True)
                following = asyncio.create_task(anext(aiter(handle)))
                server.stop()
                async with asyncio.timeout(20):
                    while "cannot read replies" not in caplog.text:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                following.cancel()

                with pytest.raises(asyncio.CancelledError):
                    await following


async def whole(handle):
    """All that its log holds."""
    return "".join([piece.text async for piece in handle.pieces()])


async def _all_without(outage, readers):
    return outage._without == set(readers)


async def _is_reading(command):
    return b"cmd=xread " in await command("CLIENT", "LIST")


class TestBlocking:
    async def test_the_same_without_a_loop(self, played, redis_url, pool):
        """Submit, stream, results, attach and errors from a thread."""

        def work():
            with BlockingClient(Client(redis=redis_url, pool=pool)) as client:
                handle = client.submit(says("a b"), stream=True)
                assert list(handle) == ["a ", "b "]
                assert handle.result().text == "a b "
                assert client.attach(handle.id).record(timeout_s=5).outcome == "completed"
                many = client.submit_many([says("c"), says("d")])
                assert {h.result().text for h in client.results(many)} == {"c ", "d "}
                with pytest.raises(RequestFailed):
                    client.submit(says("e"), tenant="fail").result()
                held = client.submit(says("f"), tenant="hold")
                with pytest.raises(TimeoutError):
                    held.result(timeout_s=0.01)
                return client.status(held.id)

        assert (await asyncio.to_thread(work)).outcome == ""

    async def test_out_of_its_block_it_says_so(self, played, redis_url, pool):
        """Before and after it, and in a forked process, where nobody would answer; a second block is as good as the first."""

        def work():
            client = BlockingClient(Client(redis=redis_url, pool=pool))
            for _ in range(2):
                with pytest.raises(StreamError, match="not connected"):
                    client.submit(says("x"))
                with client:
                    assert client.submit(says("x")).result(LIMIT_S).text == "x "
                    child = os.fork()
                    if not child:
                        try:
                            client.submit(says("x"))
                        except StreamError:
                            os._exit(7)
                        os._exit(1)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

        await asyncio.to_thread(work)


class TestMisuse:
    async def test_a_closed_client_sends_nothing(self, redis_url, pool):
        """Its handle would never end, and the connection it opened would stay."""
        async with Client(redis=redis_url, pool=pool) as client:
            handle = await client.submit(says("x"))

        for asked in (client.submit(says("y")), client.status(handle.id), anext(aiter(handle))):
            with pytest.raises(StreamError, match="not connected"):
                await asked

    async def test_what_is_sent_while_it_closes_is_not_waited_for(self, redis_url, pool):
        """Nobody reads its record any more."""
        async with Client(redis=redis_url, pool=pool) as client:
            await client.records.close()
            handle = await client.submit(says("x"))

            with pytest.raises(StreamError, match="closed before the request ended"):
                await handle

    async def test_another_loop_is_told(self, redis_url, pool):
        """Nothing would wake it there."""
        async with Client(redis=redis_url, pool=pool) as client:
            handle = await client.submit(says("x"))
            for asked in (handle.record, partial(client.submit, says("y"))):
                with pytest.raises(StreamError, match="another event loop"):
                    await asyncio.to_thread(asyncio.run, _awaited(asked))


async def _awaited(asked):
    return await asked()


def test_the_import_is_light():
    """Applications import the client: redis and msgspec, none of the fleet's own weight."""
    code = (
        "import sys, dispatcher.client;"
        "print(*({m.partition('.')[0] for m in sys.modules} "
        "& {'river', 'numpy', 'aiohttp', 'typer', 'rich', 'structlog', 'uvloop', 'pandas'}))"
    )

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == ""


def test_every_outcome_becomes_an_error_or_an_answer():
    """No outcome of the wire is without its type."""
    for outcome in get_args(Outcome):
        record = Result(id="r", outcome=outcome, reason="why", retry_after_s=2.0)
        if outcome == "completed":
            assert completion(record).text == ""
            continue
        with pytest.raises(Exception, match="why") as raised:
            completion(record)
        assert raised.value.outcome == outcome
        assert raised.value.retry_after_s == 2.0


async def test_a_cancelled_call_ends_its_task(redis_url, pool):
    """Whenever the cancellation comes: redis-py loses some of them, we do not."""
    async with Client(redis=redis_url, pool=pool) as client:
        for turns in range(30):
            asking = asyncio.create_task(_ask_and_stay(client))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            ended, _ = await asyncio.wait([asking], timeout=5)
            assert ended, f"cancelled after {turns} turns of the loop, it went on"


async def _ask_and_stay(client):
    with contextlib.suppress(UnknownRequestError):
        await client.cancel("nobody")
    await asyncio.Event().wait()
