"""The sidecar between a real Redis and an emulated vLLM over HTTP; the test plays the dispatcher."""

import asyncio
import socket

import aiohttp
import attempts
import msgspec
import pytest
import structlog
from hand import until

from dispatcher.streams.connection import Connection, Where
from scheduler import codec
from scheduler.errors import FencedError
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.settings import (
    EngineAddress,
    LeaseSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
)
from scheduler.wire.client import Control
from workers import health
from workers.attempt import Stop
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings
from workers.endpoint import Endpoint
from workers.inbox import Inbox
from workers.metrics import Meter
from workers.worker import Worker
from workers.writer import Writer

MODEL = "emulated"


def chat(n_tokens, **more):
    """A chat of exactly so many tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "tell me a story"}],
        "vllm_xargs": {"output_tokens": n_tokens},
        "max_tokens": n_tokens,
        **more,
    }


@pytest.fixture
async def emulator():
    async with Emulator(
        EmulatorSettings(time_scale=20.0, allow_faults=True, enable_per_request_metrics=True),
        die=lambda: None,
    ) as server:
        yield server


class Rig:
    """Workers started by a test, ended with it."""

    def __init__(self, redis_url, pool):
        self.redis_url, self.pool = redis_url, pool
        self.tasks = []

    async def start(self, *engines, **settings):
        lease = settings.pop("lease", LeaseSettings(worker_s=1.0, beat_s=0.3))
        worker = Worker(
            Settings(
                pool=self.pool,
                redis=RedisSettings(url=self.redis_url),
                lease=lease,
                worker=WorkerSettings(
                    engines=tuple(
                        EngineAddress(name=f"e{n}", url=url) for n, url in enumerate(engines)
                    ),
                    **{"probe_s": 0.1, "drain_s": 5.0} | settings,
                ),
            )
        )
        started = asyncio.Event()
        task = asyncio.create_task(worker.run(started.set))
        self.tasks.append((worker, task))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        return worker, task

    async def close(self):
        for worker, task in self.tasks:
            worker.stop()
            worker.stop()
            if not task.done():
                async with asyncio.timeout(10):
                    await task


@pytest.fixture
async def rig(redis_url, pool):
    started = Rig(redis_url, pool)
    yield started
    await started.close()


async def ask(emulator, path, body):
    """What the emulator itself says to it."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(emulator.url + path, json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


async def whole_text(emulator, body):
    said = await ask(emulator, "/v1/chat/completions", body)
    return said["choices"][0]["message"]["content"]


async def fault(emulator, kind, **fields):
    async with (
        aiohttp.ClientSession() as session,
        session.post(emulator.url + "/emulator/fault", json={"kind": kind, **fields}) as response,
    ):
        assert response.status == 200, await response.text()


def _id(entry):
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)


async def _holds(hand, name):
    return name in (await hand.beats())[-1].holds


async def _is_delivered(hand, stream):
    return (await hand.redis.command("XPENDING", stream, WORKER_GROUP))["pending"] == 1


async def _is_settled(hand):
    return await hand.pending() == 0


async def _serves(hand, model):
    return (await hand.beats())[-1].models == (model,)


async def running_in(emulator):
    async with (
        aiohttp.ClientSession() as session,
        session.get(emulator.url + "/metrics") as response,
    ):
        page = await response.text()
    [line] = [li for li in page.splitlines() if li.startswith("vllm:num_requests_running")]
    return float(line.rsplit(" ", 1)[1])


class Gate:
    """Between a worker and its Redis; once a certain word has come out, nothing more goes in until it is opened."""

    def __init__(self, url, word):
        self._port = int(url.rpartition(":")[2].partition("/")[0])
        self._word = word
        self._open = asyncio.Event()
        self._open.set()
        self._pumps = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def open(self):
        self._word = None
        self._open.set()

    async def _relay(self, reader, writer):
        behind, before = await asyncio.open_connection("127.0.0.1", self._port)
        for way in ((reader, before, True), (behind, writer, False)):
            self._pumps.append(asyncio.ensure_future(self._pump(*way)))

    async def _pump(self, source, target, goes_in):
        try:
            while data := await source.read(65536):
                if not goes_in and self._word and self._word in data:
                    self._open.clear()
                if goes_in:
                    await self._open.wait()
                target.write(data)
        finally:
            target.transport.abort()


class Proxy:
    """In front of one engine at a time, as a service in front of a rolling update."""

    def __init__(self, engine):
        self.engine = engine
        self._pumps = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self._break_off()

    async def turn_to(self, engine):
        """From now on it is this one; what the other was asked breaks off."""
        self.engine = engine
        await self._break_off()

    async def _break_off(self):
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _relay(self, reader, writer):
        port = int(self.engine.url.rpartition(":")[2].strip("/"))
        behind, before = await asyncio.open_connection("127.0.0.1", port)
        for way in ((reader, before), (behind, writer)):
            self._pumps.append(asyncio.ensure_future(self._pump(*way)))

    async def _pump(self, source, target):
        try:
            while data := await source.read(65536):
                target.write(data)
        finally:
            target.transport.abort()


class TestOrder:
    async def test_the_engine_is_asked_before_redis(self, emulator, hand, redis_url, pool):
        """The engine has the request while Redis has heard nothing of the worker since it gave the job out."""
        async with Gate(redis_url, b"the-first") as gate:
            rig = Rig(gate.url, pool)
            await rig.start(emulator.url)
            beat = await hand.ready()

            await hand.submit("the-first", chat(5000), beat.epoch, stream=True)

            await until(lambda: running_in(emulator))
            [[state]] = await hand.redis.hashes([hand.keys.request("the-first")], ["state"])
            assert state == b"assigned"

            gate.open()
            await until(lambda: hand.tokens("the-first"))
            await rig.close()


class TestSuccess:
    async def test_a_streaming_job_fills_the_token_log(self, emulator, hand, rig):
        """The joined log is the engine's own text, the last entry says how it ended."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        body = chat(40)

        await hand.submit("r1", body, beat.epoch, stream=True)

        result = await hand.result("r1")
        expected = await whole_text(emulator, body)
        assert result.outcome == "completed"
        assert (result.output_tokens, result.finish_reason) == (40, "stop")
        assert await hand.text("r1") == expected
        log = await hand.tokens("r1")
        assert [part.end for part in log if part.end] == ["completed"]
        assert msgspec.json.decode(result.body)["choices"][0]["message"]["content"] == expected

    async def test_a_quiet_job_gets_the_whole_response(self, emulator, hand, rig):
        """Without a stream the result holds what the engine would have sent whole, and no log is written."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        body = chat(12)

        await hand.submit("r1", body, beat.epoch)

        result = await hand.result("r1")
        expected = await ask(emulator, "/v1/chat/completions", body)
        response = msgspec.json.decode(result.body)
        assert response["choices"] == [
            {**expected["choices"][0], "message": response["choices"][0]["message"]}
        ]
        assert (
            response["choices"][0]["message"]["content"]
            == expected["choices"][0]["message"]["content"]
        )
        assert response["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
        assert response["object"] == "chat.completion"
        assert await hand.tokens("r1") == []

    async def test_the_reward_says_what_it_cost(self, emulator, hand, rig):
        """It carries the decision's features and the engine's own measures, and promises are judged."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(20), beat.epoch, ttft_s=60.0, tpot_s=1e-6)

        result, reward = await hand.result("r1"), await hand.reward("r1")
        assert (reward.outcome, reward.features, reward.output_tokens) == (
            "completed",
            ("x=1",),
            20,
        )
        assert reward.admitted_at <= reward.first_token_at <= reward.finished_at
        assert reward.prefill_s > 0
        assert reward.queue_s is not None
        assert reward.cached_tokens == 0
        assert result.on_time is False

    async def test_no_first_token_came_before_its_request(self, emulator, hand, rig):
        """Redis' clock went back an hour since it was enqueued: sums of seconds must not."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(3), beat.epoch, job_enqueued_at=hand.redis.now() + 3600.0)

        result, reward = await hand.result("r1"), await hand.reward("r1")
        assert (result.outcome, result.ttft_s, reward.ttft_s) == ("completed", 0.0, 0.0)

    async def test_a_claim_checked_body_is_fetched(self, emulator, hand, rig):
        """A body too long for its entry lies in a key of its own."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        body = chat(3, messages=[{"role": "user", "content": "x" * 5000}])

        await hand.submit("r1", body, beat.epoch)

        assert (await hand.result("r1")).prompt_tokens > 1000

    async def test_news_ride_on_beats(self, emulator, hand, rig):
        """The dispatcher hears of the admission and of the first token without waiting for the next beat."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(10), beat.epoch)
        await hand.result("r1")

        async def told():
            beats = await hand.beats()
            started = [name for one in beats for name in one.started]
            first = [name.rpartition(":")[0] for one in beats for name in one.first_tokens]
            return started == ["r1:1"] and first == ["r1:1"]

        await until(told)
        assert beat.kv_tokens > 0
        assert beat.models == (MODEL,)

    async def test_an_engine_s_password_stays_out_of_the_log(self, emulator, hand, rig):
        """It may stand in the URL, for a proxy before the engine; what is logged is read by others."""
        with structlog.testing.capture_logs() as logs:
            await rig.start(emulator.url.replace("//", "//me:secret@"))
            await hand.ready("e0")
        assert any(one["event"] == "joined" for one in logs)
        assert "secret" not in str(logs)

    async def test_two_engines_in_one_process(self, emulator, hand, rig):
        """Each has its own name, epoch and stream."""
        async with Emulator(EmulatorSettings(time_scale=20.0, model="other")) as second:
            await rig.start(emulator.url, second.url)
            first_beat, second_beat = await hand.ready("e0"), await hand.ready("e1")
            other = chat(5, model="other")

            await hand.submit("r1", chat(5), first_beat.epoch)
            await hand.submit("r2", other, second_beat.epoch, job_endpoint="e1")

            assert (await hand.result("r1")).endpoint == "e0"
            assert (await hand.result("r2")).endpoint == "e1"
            assert second_beat.models == ("other",)
            await rig.close()


MISBEHAVIOUR = [
    pytest.param("status", {"status": 500}, id="500"),
    pytest.param("status", {"status": 503}, id="503"),
    pytest.param("status", {"status": 429}, id="429"),
    pytest.param("garbage", {}, id="garbage"),
    pytest.param("silence", {}, id="never answers"),
    pytest.param("hang", {"after_tokens": 9}, id="stops in the middle"),
    pytest.param("cut", {"after_tokens": 0}, id="cut before the first token"),
    pytest.param("cut", {"after_tokens": 9}, id="cut in the middle"),
    pytest.param("error_chunk", {"after_tokens": 9}, id="error inside 200"),
    pytest.param("abort", {"after_tokens": 9}, id="abort inside 200"),
    pytest.param("no_tokens", {}, id="no tokens"),
    pytest.param("no_done", {}, id="no finish reason"),
]


class TestMisbehaviour:
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    @pytest.mark.parametrize(("kind", "fields"), MISBEHAVIOUR)
    async def test_it_goes_back_and_is_continued(self, emulator, hand, rig, kind, fields, path):
        """Whatever an engine does instead of answering, the next attempt goes on where the log ends."""
        await rig.start(emulator.url, first_token_s=0.4, gap_s=0.4)
        beat = await hand.ready()
        body = chat(24)
        if path == "/v1/completions":
            del body["messages"]
            body["prompt"] = "tell me"
        whole = (await ask(emulator, path, body))["choices"][0]
        expected = whole.get("text") or whole["message"]["content"]
        await fault(emulator, kind, **fields)

        await hand.submit("r1", body, beat.epoch, stream=True, path=path)
        first = await hand.reward("r1")
        assert (first.outcome, first.retryable) == ("returned", True)
        assert first.reason
        last = await hand.assign_until_it_ends("r1", beat.epoch, attempt=2)

        result = await hand.result("r1")
        assert (result.outcome, result.output_tokens, result.attempt) == ("completed", 24, last)
        assert await hand.text("r1") == expected
        choice = msgspec.json.decode(result.body)["choices"][0]
        assert (choice.get("text") or choice["message"]["content"]) == expected
        assert len(await hand.results("r1")) == 1

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_an_engine_that_knows_no_limit_is_cut_off(
        self, emulator, hand, rig, path, stream
    ):
        """The client asked for no more and has it, as an answer; the engine is told to stop, and operators hear of it."""
        worker, _ = await rig.start(emulator.url)
        beat = await hand.ready()
        body = {"model": MODEL, "max_tokens": 24, "ignore_eos": True}
        body |= {"messages": chat(1)["messages"]} if "chat" in path else {"prompt": "tell me"}
        whole = (await ask(emulator, path, body))["choices"][0]
        expected = whole.get("text") or whole["message"]["content"]
        await fault(emulator, "endless", tokens=50_000)

        with structlog.testing.capture_logs() as logs:
            await hand.submit("r1", body, beat.epoch, stream=stream, path=path)
            result = await hand.result("r1")
            await until(lambda: _is_settled(hand))

        assert (result.outcome, result.finish_reason, result.attempt) == ("completed", "length", 1)
        assert 24 < result.output_tokens < 50_000
        choice = msgspec.json.decode(result.body)["choices"][0]
        text = choice.get("text") or choice["message"]["content"]
        assert text.startswith(expected)
        assert choice["finish_reason"] == "length"
        assert await hand.text("r1") == (text if stream else "")
        await until(lambda: emulator.service.engine.n_running == 0)
        assert [one["max_tokens"] for one in logs if one["event"] == "overrun"] == [24]
        [endpoint] = worker.endpoints
        said = endpoint._meter.registry.get_sample_value
        assert said("headgate_worker_overruns_total", {"endpoint": "e0"}) == 1

    async def test_behind_a_hole_it_is_said_anew(self, emulator, hand, rig):
        """Redis lost the log's beginning: nobody could go on from the rest, and the request is answered all the same."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        body = chat(24)
        expected = await whole_text(emulator, body)
        await fault(emulator, "cut", after_tokens=9)
        await hand.submit("r1", body, beat.epoch, stream=True)
        await hand.reward("r1")
        log = hand.keys.tokens("r1")
        [(first, _), *_] = await hand.redis.entries(log)
        await hand.redis.command("XDEL", log, first)

        await hand.assign("r1", beat.epoch, attempt=2)

        result = await hand.result("r1")
        assert (result.outcome, result.output_tokens, result.attempt) == ("completed", 24, 2)
        assert await hand.text("r1") == expected
        parts = await hand.tokens("r1")
        assert {part.attempt for part in parts} == {2}
        ends = [part.index + part.pieces for part in parts]
        assert [part.index for part in parts] == [0, *ends[:-1]]

    async def test_token_ids_are_continued_by_their_ids(self, emulator, hand, rig):
        """A prompt of ids goes on with the ids that were generated, which the log keeps."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        body = {
            "model": MODEL,
            "prompt": [7, 8, 9],
            "max_tokens": 30,
            "vllm_xargs": {"output_tokens": 30},
        }
        expected = (await ask(emulator, "/v1/completions", body))["choices"][0]["text"]
        await fault(emulator, "cut", after_tokens=11)

        await hand.submit("r1", body, beat.epoch, stream=True, path="/v1/completions")
        await hand.reward("r1")
        await hand.assign("r1", beat.epoch, attempt=2)

        result = await hand.result("r1")
        assert (result.outcome, result.output_tokens) == ("completed", 30)
        assert await hand.text("r1") == expected

    async def test_the_last_attempt_fails_for_good(self, emulator, hand, rig):
        """After its attempts the request fails with the engine's words, and its fields lie in `dead`."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await fault(emulator, "status", status=500)

        await hand.submit("r1", chat(5), beat.epoch, job_max_attempts=1)

        result = await hand.result("r1")
        assert (result.outcome, result.status) == ("failed", 500)
        assert len(await hand.redis.entries(hand.keys.dead)) == 1

    async def test_a_bad_request_is_not_tried_again(self, emulator, hand, rig):
        """A 4xx that names the request fails it at once, with the engine's own message."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(5, max_tokens=10**9), beat.epoch)

        result = await hand.result("r1")
        assert (result.outcome, result.status) == ("failed", 400)
        assert "max_model_len" in result.reason

    async def test_an_unknown_model_may_live_elsewhere(self, emulator, hand, rig):
        """404 goes back: another engine may serve it."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(5, model="nobody"), beat.epoch)

        reward = await hand.reward("r1")
        assert (reward.outcome, reward.retryable) == ("returned", True)
        assert "nobody" in reward.reason

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b"not json", id="no JSON"),
            pytest.param(b"[1]", id="no object"),
            pytest.param(b'{"prompt": "hi"}', id="no messages"),
        ],
    )
    async def test_an_unreadable_body_is_invalid(self, emulator, hand, rig, body):
        """The engine never sees it; the client hears why."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", body, beat.epoch)

        result = await hand.result("r1")
        assert (result.outcome, bool(result.reason)) == ("invalid", True)

    async def test_what_cannot_be_continued_fails_rather_than_repeats(self, emulator, hand, rig):
        """Text was written and the request wants log probabilities: no attempt may say it twice."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await fault(emulator, "cut", after_tokens=5)

        await hand.submit("r1", chat(20, logprobs=True), beat.epoch, stream=True)
        await hand.reward("r1")
        before = await hand.text("r1")
        await hand.assign("r1", beat.epoch, attempt=2)

        result = await hand.result("r1")
        assert result.outcome == "failed"
        assert "logprobs" in result.reason
        assert await hand.text("r1") == before

    async def test_transfer_parameters_of_clients_never_reach_the_engine(self, emulator, hand, rig):
        """They kill a real engine; here they are dropped and the request is served."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(5, kv_transfer_params={"do_remote_prefill": True}), beat.epoch)

        assert (await hand.result("r1")).outcome == "completed"


class TestEnding:
    async def test_a_cancel_reaches_the_engine(self, emulator, hand, rig):
        """The connection is closed, and the engine's seat is free."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await hand.submit("r1", chat(20_000), beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))
        assert await running_in(emulator) == 1

        await hand.cancel("r1")

        result = await hand.result("r1")
        assert (result.outcome, result.reason) == ("cancelled", "not wanted any more")

        async def is_free():
            return await running_in(emulator) == 0

        await until(is_free)

    async def test_a_cancel_before_the_start_is_seen_at_the_start(self, emulator, hand, rig):
        """The tombstone alone is enough: `start` says 2."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await fault(emulator, "silence")
        await hand.enqueue("r1", chat(5))
        await hand.assign("r1", beat.epoch + 0)
        await hand.redis.command("HSET", hand.keys.request("r1"), "cancelled", "1")
        await hand.cancel("r1")

        assert (await hand.result("r1")).outcome == "cancelled"

    async def test_one_halted_before_its_first_turn_ends_as_well(self, emulator, hand, rig):
        """A word that comes in the very turn in which it is posted: the engine is rid of it, and the client told."""
        worker, _ = await rig.start(emulator.url)
        beat = await hand.ready()
        await hand.submit("first", chat(2), beat.epoch)
        await hand.result("first")  # a connection is kept now
        [endpoint] = worker.endpoints
        note = endpoint._pulse.started

        def halted(name):
            endpoint._hands.running["r1"].halt(Stop("cancelled", "at once"))
            note(name)

        endpoint._pulse.started = halted
        await hand.submit("r1", chat(100_000), beat.epoch, stream=True)

        result = await hand.result("r1")
        assert (result.outcome, result.reason) == ("cancelled", "at once")

        async def is_idle():
            return await running_in(emulator) == 0

        await until(is_idle)

    async def test_the_deadline_ends_it_in_the_middle(self, emulator, hand, rig):
        """Past its deadline a running request expires and its seat is freed."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(20_000), beat.epoch, deadline_s=0.5, stream=True)

        result = await hand.result("r1")
        assert result.outcome == "expired"
        assert result.on_time is False
        assert [part.end for part in await hand.tokens("r1")][-1] == "expired"

    async def test_drain_lets_the_running_finish(self, emulator, hand, rig):
        """After SIGTERM beats say draining, what runs finishes, what arrives goes back, the worker ends."""
        worker, task = await rig.start(emulator.url)
        beat = await hand.ready()
        await hand.submit("r1", chat(1000), beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        worker.stop()

        async def is_draining():
            return (await hand.beats())[-1].state == "draining"

        await until(is_draining)
        await hand.submit("r2", chat(5), beat.epoch)
        assert (await hand.reward("r2")).outcome == "returned"
        await task
        assert (await hand.result("r1")).outcome == "completed"

    async def test_drain_hands_back_what_takes_too_long(self, emulator, hand, rig):
        """After `drain_s` the rest goes back with its text, to be continued elsewhere."""
        worker, task = await rig.start(emulator.url, drain_s=0.1)
        beat = await hand.ready()
        await hand.submit("r1", chat(20_000), beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        worker.stop()
        await task

        assert (await hand.reward("r1")).outcome == "returned"
        state = await hand.redis.command("HGET", hand.keys.request("r1"), "state")
        assert state == b"waiting"

    async def test_a_log_is_taken_in_its_order(self, emulator, hand, rig):
        """A Redis at its limit refuses pieces and takes the end behind them: then it would have lost what it never had."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await hand.refuse_to("tokens")
        body = chat(20)
        await hand.submit("r1", body, beat.epoch, stream=True)

        async def end_is_tried():
            refused = await hand.redis.command("INFO", "errorstats")
            return "errorstat_TORN" in refused or await hand.results("r1")

        await hand.redis.command("CONFIG", "RESETSTAT")
        await until(end_is_tried)
        await hand.relent()

        assert (await hand.result("r1")).outcome == "completed"
        assert [part.lost for part in await hand.tokens("r1") if part.lost] == []
        assert await hand.text("r1") == await whole_text(emulator, body)


class TestLease:
    async def test_a_cancel_that_comes_with_the_fence_is_obeyed(self, redis_url, pool, emulator):
        """Whoever ends the endpoint in the moment in which it is fenced is not ignored."""
        connection = await Connection.connect(Where(url=redis_url))
        keys, meter = Keys("hg", pool), Meter()
        endpoint = Endpoint(
            EngineAddress(name="e0", url=emulator.url),
            connection=connection,
            writer=Writer(connection, keys, WorkerSettings(), meter),
            keys=keys,
            settings=WorkerSettings(),
            lease=LeaseSettings(),
            meter=meter,
            worker="w",
        )

        async def fenced():
            living.cancel()
            raise FencedError("a newer worker has joined")

        endpoint._pulse.run = fenced
        living = asyncio.create_task(endpoint.run())

        with pytest.raises(asyncio.CancelledError):
            await living
        await connection.close()

    async def test_a_newer_worker_takes_the_name(self, emulator, hand, rig):
        """The older stands down with a clear word; what it held runs again under the newer epoch."""
        stood, older = await rig.start(emulator.url)
        first = await hand.ready()
        body = chat(1500)
        await hand.submit("r1", body, first.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        await rig.start(emulator.url)
        second = await hand.ready(after=first.epoch)

        with pytest.raises(FencedError, match="newer"):
            await older
        assert [endpoint.state for endpoint in stood.endpoints] == ["draining"]
        rig.tasks.pop(0)
        assert await hand.reclaim("r1") == 1
        await hand.assign("r1", second.epoch, attempt=2)
        assert (await hand.result("r1")).outcome == "completed"
        assert await hand.text("r1") == await whole_text(emulator, body)

    @pytest.mark.parametrize("left", ["", "1"], ids=["nothing", "an older epoch"])
    async def test_a_redis_that_forgot_it_is_joined_anew(self, emulator, hand, rig, left):
        """What Redis has lost, its last second or everything, is no newer worker: the name is taken up again."""
        await rig.start(emulator.url)
        first = await hand.ready()

        glance = hand.keys.endpoint("e0")
        words = ("HSET", glance, "epoch", left) if left else ("DEL", glance)
        await hand.redis.command(*words)

        second = await hand.ready(after=first.epoch)
        await hand.submit("r1", chat(5), second.epoch)
        assert (await hand.result("r1")).outcome == "completed"

    async def test_jobs_of_another_epoch_are_left_alone(self, emulator, hand, rig):
        """A job for an older life of the endpoint is acknowledged and nothing else."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await hand.submit("old", chat(5), beat.epoch - 1)
        await hand.submit("new", chat(5), beat.epoch)

        await hand.result("new")

        assert await hand.results("old") == []
        assert await hand.redis.entries(hand.keys.jobs("e0")) == []

    async def test_a_job_delivered_to_a_frozen_predecessor_is_found(self, emulator, hand, rig):
        """The server hands entries to whoever waited first, dead or alive; the living takes them over."""
        stream = hand.keys.jobs("e0")
        await hand.redis.ensure_group(stream, WORKER_GROUP)
        ghost = asyncio.create_task(
            hand.redis.read_group(WORKER_GROUP, "ghost", [stream], count=1, block_s=10)
        )
        await asyncio.sleep(0)
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(5), beat.epoch)

        assert len((await ghost)[stream]) == 1
        assert (await hand.result("r1")).outcome == "completed"

    async def test_a_predecessor_puts_no_word_away(self, emulator, hand, rig):
        """Thawed and not fenced yet, it reads beside its successor: what is to be cancelled is, whoever is handed the word."""
        stream = hand.keys.jobs("e0")
        old = Inbox(hand.redis, hand.keys, "e0", "old")
        await old.open()
        names = [f"r{number}" for number in range(8)]
        heard = []

        async def reads():
            while True:
                await old.read(64)
                await old.take(1, lambda *word: heard.append(word), lambda _: False)

        async with asyncio.TaskGroup() as group:
            reading = group.create_task(reads())
            await rig.start(emulator.url)
            beat = await hand.ready()
            for name in names:
                await hand.submit(name, chat(100_000), beat.epoch)
            await until(lambda: emulator.service.engine.n_running == len(names))
            for name in names:
                await hand.cancel(name)

            for name in names:
                assert (await hand.result(name)).outcome == "cancelled"
            reading.cancel()
        assert heard, "or nothing was tried"
        await until(lambda: _is_settled(hand))
        assert await hand.redis.entries(stream) == []

    async def test_a_job_whose_request_is_gone_does_not_stay(self, emulator, hand, rig):
        """Redis lost the request and not its job: nobody else would ever take that away, and a drain wait for ever."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        stream = hand.keys.jobs("e0")
        lost = attempts.job("r1", epoch=beat.epoch, path="/v1/completions", body=b'{"prompt": "x"}')
        await hand.redis.add(stream, codec.encode(lost))

        async def empty():
            return await hand.redis.command("XLEN", stream) == 0

        await until(empty)
        assert (await hand.redis.command("XPENDING", stream, WORKER_GROUP))["pending"] == 0
        assert await hand.results("r1") == []

    async def test_a_word_that_comes_with_its_job_ends_it(self, emulator, hand, rig):
        """By hand, so that no tombstone says the same; the worker was away, and reads both at once."""
        await hand.redis.ensure_group(hand.keys.jobs("e0"), WORKER_GROUP)
        epoch = int(1e3 * hand.redis.now()) + 10**9
        await hand.redis.command("HSET", hand.keys.endpoint("e0"), "epoch", epoch - 1)
        await hand.submit("r1", chat(1000), epoch)
        word = codec.encode(Control(action="cancel", id="r1", reason="not wanted"))
        await hand.redis.add(hand.keys.jobs("e0"), word)

        await rig.start(emulator.url)

        result = await hand.result("r1")
        assert (result.outcome, result.reason) == ("cancelled", "not wanted")
        await until(lambda: _is_settled(hand))

    async def test_what_its_namesake_was_given_and_never_saw_to_does_not_stay(
        self, emulator, hand, rig
    ):
        """Restarted under its name, as in a container: words to cancel that nobody answers would keep a drain for ever."""
        stream = hand.keys.jobs("e0")
        await hand.redis.ensure_group(stream, WORKER_GROUP)
        await hand.submit("r1", chat(5), 1)
        await hand.cancel("r1")
        given = await hand.redis.read_group(WORKER_GROUP, "pod-1", [stream], count=10, block_s=None)
        assert len(given[stream]) == 2

        await rig.start(emulator.url, name="pod-1")
        await hand.ready()

        async def empty():
            return await hand.redis.command("XLEN", stream) == 0

        await until(empty)
        assert (await hand.redis.command("XPENDING", stream, WORKER_GROUP))["pending"] == 0

    async def test_an_id_that_redis_lost_and_was_sent_again(self, emulator, hand, rig):
        """The same attempt of another entry is another job: it replaces the one that is in hand, and nothing stays behind."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await fault(emulator, "freeze")
        old = await hand.submit("r1", chat(5), beat.epoch)
        await until(lambda: _holds(hand, "r1:1"))
        requests, jobs = hand.keys.requests, hand.keys.jobs("e0")
        [(job, _)] = await hand.redis.entries(jobs)
        await hand.redis.commands(
            [
                ("XACK", requests, DISPATCHER_GROUP, old.entry),
                ("XACK", jobs, WORKER_GROUP, job),
                ("XDEL", jobs, job),
                ("DEL", hand.keys.request("r1")),
            ]
        )

        await hand.submit("r1", chat(7), beat.epoch)
        await until(lambda: _is_delivered(hand, jobs))
        await fault(emulator, "thaw")

        assert (await hand.result("r1")).output_tokens == 7
        await until(lambda: _is_settled(hand))

    async def test_beats_say_what_is_in_hand(self, emulator, hand, rig):
        """Each job read and not ended, by id; and up to when everything was read."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await fault(emulator, "freeze")
        for name in ("r2", "r1"):
            await hand.submit(name, chat(5), beat.epoch)
        handed_at = hand.redis.now()

        async def both_are_held():
            last = (await hand.beats())[-1]
            is_after = last.read_at is not None and last.read_at > handed_at - 0.5
            return is_after and last.holds == ("r1:1", "r2:1")

        await until(both_are_held)
        await fault(emulator, "thaw")
        for name in ("r1", "r2"):
            assert (await hand.result(name)).outcome == "completed"

        async def is_empty():
            last = [beat for beat in await hand.beats() if beat.read_at is not None][-1]
            return last.holds == () and last.read_at > handed_at

        await until(is_empty)

    async def test_a_job_of_another_version_goes_back(self, emulator, hand, rig):
        """What this worker cannot read is not lost: it is handed back with the reason."""
        await rig.start(emulator.url)
        beat = await hand.ready()

        await hand.submit("r1", chat(5), beat.epoch, job_leg="encode")

        reward = await hand.reward("r1")
        assert (reward.outcome, "'leg' is 'encode'" in reward.reason) == ("returned", True)

    async def test_what_was_reclaimed_is_dropped_in_silence(self, emulator, hand, rig):
        """The fence refuses the late writes; the engine is told by closing the connection."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        await hand.submit("r1", chat(20_000), beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        assert await hand.reclaim("r1") == 1

        async def is_free():
            return await running_in(emulator) == 0

        await until(is_free)
        assert await hand.results("r1") == []
        assert await hand.rewards("r1") == []


class TestEngineState:
    async def test_an_absent_engine_is_no_reason_to_end(self, hand, rig):
        """The worker says away and why, keeps asking, and is ready when the engine is."""
        emulator = Emulator(EmulatorSettings(time_scale=20.0))
        await emulator.start()
        port = emulator.url.rpartition(":")[2]
        await emulator.stop()
        await rig.start(emulator.url)

        async def says_away():
            return [b for b in await hand.beats() if b.state == "away" and "onnect" in b.reason]

        await until(says_away)
        async with Emulator(EmulatorSettings(time_scale=20.0, port=int(port))):
            assert (await hand.ready()).models == (MODEL,)
            await rig.close()

    async def test_a_crashed_engine_is_known_before_its_jobs_are_back(self, hand, rig):
        """The beat that says away comes before the hand-back: a dispatcher must not send the job straight back."""
        emulator = Emulator(EmulatorSettings(time_scale=20.0))
        await emulator.start()
        await rig.start(emulator.url, probe_s=60.0)
        beat = await hand.ready()
        await hand.submit("r1", chat(20_000), beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        await emulator.stop()

        reward = await hand.reward("r1")
        assert reward.outcome == "returned"
        [(returned, _)] = await hand.redis.entries(hand.keys.rewards)
        away = [
            entry
            for entry, fields in await hand.redis.entries(hand.keys.beats)
            if fields[b"state"] == b"away" and fields[b"reason"] != b"not asked yet"
        ]
        assert _id(away[0]) <= _id(returned)
        await rig.close()

    async def test_a_paused_engine_is_away_whatever_health_says(self, emulator, hand, rig):
        """/health is 200 while paused: the worker asks further, and gives back what arrives."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        async with aiohttp.ClientSession() as session:
            await session.post(emulator.url + "/pause", params={"mode": "keep"})

            async def says_away():
                return (await hand.beats())[-1].reason == "paused"

            await until(says_away)
            await hand.submit("r1", chat(5), beat.epoch)
            reward = await hand.reward("r1")
            assert (reward.outcome, "paused" in reward.reason) == ("returned", True)
            await session.post(emulator.url + "/resume")

        async def is_back():
            return (await hand.beats())[-1].state == "ready"

        await until(is_back)

    async def test_another_engine_between_two_probes(self, emulator, hand, rig):
        """Nobody saw it go: the first request that it does not know the model of shows what it serves now."""
        other = EmulatorSettings(model="other", max_model_len=4096, time_scale=20.0)
        async with Emulator(other, die=lambda: None) as successor, Proxy(emulator) as proxy:
            await rig.start(proxy.url, probe_s=60.0)
            first = await hand.ready()
            await proxy.turn_to(successor)

            await hand.submit("r1", chat(5), first.epoch)

            reward = await hand.reward("r1")
            assert (reward.outcome, reward.retryable) == ("returned", True)
            last = (await hand.beats())[-1]
            assert (last.state, last.models, last.max_model_len) == ("ready", ("other",), 4096)

    async def test_what_it_serves_is_asked_now_and_then(self, emulator, hand, rig, monkeypatch):
        """Adapters and lengths change without a request that would show it."""
        monkeypatch.setattr(health, "CARDS_S", 0.0)
        other = EmulatorSettings(model="other", time_scale=20.0)
        async with Emulator(other, die=lambda: None) as successor, Proxy(emulator) as proxy:
            await rig.start(proxy.url)
            await hand.ready()
            await proxy.turn_to(successor)

            await until(lambda: _serves(hand, "other"))

    async def test_failures_in_a_row_speak_louder_than_health(self, emulator, hand, rig):
        """An engine that fails everything is away although /health is 200; one real token brings it back."""
        await rig.start(emulator.url, failures_max=2)
        beat = await hand.ready()
        await fault(emulator, "status", status=500, count=2)

        await hand.submit("r1", chat(5), beat.epoch)
        await hand.submit("r2", chat(5), beat.epoch)

        async def was_away():
            return any("in a row" in one.reason for one in await hand.beats())

        async def is_back():
            return (await hand.beats())[-1].state == "ready"

        await until(was_away)
        await until(is_back)

    async def test_a_frozen_engine_loses_its_streams_to_others(self, emulator, hand, rig):
        """Not one byte from it while answers are under way: away, whatever /health says, and all goes back."""
        await rig.start(emulator.url, stall_s=0.3, connect_s=0.3)
        beat = await hand.ready()
        body = chat(1200)
        await hand.submit("r1", body, beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        await fault(emulator, "freeze")

        reward = await hand.reward("r1")
        assert (reward.outcome, "sent nothing" in reward.reason) == ("returned", True)

        async def says_away():
            return (await hand.beats())[-1].state == "away"

        await until(says_away)
        await fault(emulator, "thaw")

        async def is_back():
            return (await hand.beats())[-1].state == "ready"

        await until(is_back)
        await hand.assign("r1", beat.epoch, attempt=2)
        assert (await hand.result("r1")).output_tokens == 1200
        assert await hand.text("r1") == await whole_text(emulator, body)


class TestAdmission:
    async def test_a_tight_promise_keeps_the_batch_small(self, hand, rig):
        """With room for two hundred, a TPOT promise lets only as many in as its step time allows."""
        async with Emulator(EmulatorSettings(profile="a100", time_scale=4.0)) as emulator:
            worker, _ = await rig.start(emulator.url, margin=0.0, patience_s=600.0)
            beat = await hand.ready()
            await hand.submit("r0", chat(100), beat.epoch)
            await hand.result("r0")
            # What the worker knows now: until one of the six decodes it learns nothing, and nobody is late.
            of_two_s = worker.endpoints[0].rhythm.step_time.law.step_s(2, 25_000)

            body = chat(50, messages=[{"role": "user", "content": "x" * 40_000}])
            for name in "abcdef":
                promise = {"tpot_s": of_two_s, "job_prompt_tokens": 10_000}
                await hand.submit(name, body, beat.epoch, **promise)

            assert {(await hand.result(name)).outcome for name in "abcdef"} == {"completed"}
            rewards = [await hand.reward(name) for name in "abcdef"]
            rewards.sort(key=lambda reward: reward.admitted_at)
            assert rewards[2].admitted_at >= min(one.first_token_at for one in rewards[:2])
            await rig.close()


class TestMetrics:
    async def test_prometheus_can_read_them(self, emulator, hand, rig):
        """Outcomes by reason, tokens, gaps, the step law; vLLM's names where it has one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        await rig.start(emulator.url, metrics_port=port)
        beat = await hand.ready()
        await hand.submit("r1", chat(30), beat.epoch)
        await hand.result("r1")

        async def page():
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{port}/metrics") as response,
            ):
                text = await response.text()
                return text if "outcomes_total{" in text else ""

        text = await until(page)

        for line in (
            'headgate_worker_outcomes_total{endpoint="e0",outcome="completed"} 1.0',
            'headgate_worker_generation_tokens_total{endpoint="e0"} 30.0',
            'headgate_worker_inter_token_latency_seconds_count{endpoint="e0"}',
            'headgate_worker_time_to_first_token_seconds_count{endpoint="e0"} 1.0',
            'headgate_worker_step_seconds{endpoint="e0",term="base"}',
            'headgate_worker_engine_ready{endpoint="e0"} 1.0',
        ):
            assert line in text
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/readyz") as response,
        ):
            assert response.status == 200
