"""How an attempt ends on a real Redis: one record and what it cost, or back to be tried elsewhere; then it is gone."""

import asyncio
import contextlib

import pytest
import structlog
from attempts import pulled
from hand import until

from scheduler import codec
from scheduler.errors import EngineError
from scheduler.settings import EngineAddress, WorkerSettings
from scheduler.wire.dispatcher import Dead
from workers.attempt import FENCED, Attempt, Stop
from workers.ending import Ending
from workers.halves import CLAIM
from workers.metrics import Meter
from workers.writer import Writer

KV_S = 20.0

SAID = (
    b'data: {"choices":[{"text":"hi","finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
)


class Desk:
    """An ending with its writer; the test hands it attempts and plays the dispatcher."""

    def __init__(self, hand):
        self.hand, self.meter = hand, Meter()
        settings = WorkerSettings(keep_s=100.0)
        self.writer = Writer(hand.redis, hand.keys, settings, self.meter)
        self.gone: list[Attempt] = []
        self.ending = Ending(
            EngineAddress(name="e0", url="http://127.0.0.1:1", hardware="a100"),
            writer=self.writer,
            keys=hand.keys,
            settings=settings,
            meter=self.meter,
            clock=hand.redis.now,
            gone=self.gone.append,
            kv_s=KV_S,
        )

    async def running(self, request_id="r1", **fields):
        """An attempt in the engine, which has said its two tokens."""
        one = await pulled(self.hand, request_id, **fields)
        one.stage = "running"
        one.admitted_at = one.first_token_at = self.hand.redis.now()
        one.admitted_tick, one.first_tick, one.last_tick = 1.0, 2.0, 3.0
        one.answer.feed(SAID)
        return one

    async def state(self, request_id="r1"):
        [[state]] = await self.hand.redis.hashes([self.hand.keys.request(request_id)], ["state"])
        return state.decode()

    async def dead(self):
        entries = await self.hand.redis.entries(self.hand.keys.dead)
        return [codec.decode(Dead, fields) for _, fields in entries]

    def counted(self, name, **labels):
        return self.meter.registry.get_sample_value(f"headgate_worker_{name}_total", labels) or 0.0

    async def settled(self):
        async with asyncio.timeout(10):
            await self.writer.settled()


@pytest.fixture
async def desk(hand):
    made = Desk(hand)
    writing = asyncio.create_task(made.writer.run())
    yield made
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing


class TestFinish:
    async def test_one_record_one_reward_and_nothing_pending(self, desk, hand):
        """All that a client waits for, all that is learnt from it; and no stream holds the request any more."""
        one = await desk.running(stream=True)

        with structlog.testing.capture_logs() as logs:
            desk.ending.finish(one, "completed")
            assert one.stage == "ending"
            await desk.settled()

        [result], [reward] = await hand.results("r1"), await hand.rewards("r1")
        assert (result.outcome, result.status, result.output_tokens) == ("completed", 200, 2)
        assert (reward.outcome, reward.retryable, reward.hardware) == ("completed", False, "a100")
        assert await hand.text("r1") == "hi"
        assert [part.end for part in await hand.tokens("r1")] == ["", "completed"]
        assert await hand.pending() == 0
        assert await desk.dead() == []
        assert desk.gone == [one]
        assert desk.counted("outcomes", endpoint="e0", outcome="completed") == 1
        assert [one["outcome"] for one in logs if one["event"] == "outcome"] == ["completed"]

    async def test_it_is_in_hand_until_its_reward_is_written(self, desk, hand):
        """A beat must not say before that it is gone: the dispatcher would think it lost and try it again."""
        one = await desk.running()
        await hand.refuse_to("settle")

        desk.ending.finish(one, "completed")
        await until(lambda: hand.results("r1"))
        await until(lambda: desk.writer.is_away)
        assert desk.gone == []
        await hand.relent()
        await desk.settled()

        assert desk.gone == [one]
        assert len(await hand.results("r1")) == len(await hand.rewards("r1")) == 1

    async def test_who_was_fenced_ends_nothing(self, desk, hand):
        """The request is another's by now: no record, no reward, and it is dropped."""
        one = await desk.running(stream=True)
        await hand.reclaim("r1")

        with structlog.testing.capture_logs() as logs:
            desk.ending.finish(one, "completed")
            await desk.settled()

        assert await hand.results("r1") == await hand.rewards("r1") == []
        assert await hand.tokens("r1") == []
        assert await desk.state() == "waiting"
        assert desk.gone == [one]
        assert desk.counted("fenced") == 1
        assert desk.counted("outcomes", endpoint="e0", outcome="completed") == 0
        assert not [one for one in logs if one["event"] == "outcome"]

    async def test_said_twice_it_happens_once(self, desk, hand):
        """An attempt in two hands, by whatever accident: the first record stays the only one."""
        one = await desk.running()

        desk.ending.finish(one, "completed")
        desk.ending.finish(one, "failed", "too late")
        await desk.settled()

        assert [one.outcome for one in await hand.results("r1")] == ["completed"]
        assert len(await hand.rewards("r1")) == 1


class TestFailed:
    async def test_another_engine_may_do_better(self, desk, hand):
        """It goes back with the reason, and nothing of it stays in this endpoint's stream."""
        one = await desk.running(stream=True, job_attempt=2)

        with structlog.testing.capture_logs() as logs:
            desk.ending.failed(one, EngineError("broken", status=503))
            assert one.stage == "ending"
            await desk.settled()

        [reward] = await hand.rewards("r1")
        assert (reward.outcome, reward.reason, reward.retryable) == ("returned", "broken", True)
        assert (reward.hardware, reward.kv_params) == ("a100", b"")
        assert await desk.state() == "waiting"
        assert await hand.results("r1") == []
        assert await hand.text("r1") == "hi", "what it has said stays, the next goes on from there"
        assert await hand.redis.entries(hand.keys.jobs("e0")) == []
        assert desk.gone == [one]
        assert desk.counted("returned", endpoint="e0") == 1
        assert [one["reason"] for one in logs if one["event"] == "returned"] == ["broken"]

    @pytest.mark.parametrize(
        ("attempt", "error"),
        [
            pytest.param(3, EngineError("broken", status=503), id="the last attempt"),
            pytest.param(4, EngineError("broken", status=503), id="beyond the last"),
            pytest.param(1, EngineError("bad", retryable=False, status=400), id="its own fault"),
        ],
    )
    async def test_it_fails_for_good(self, desk, hand, attempt, error):
        """With the engine's words and status; and what was asked is kept for a requeue."""
        one = await desk.running(job_attempt=attempt)

        desk.ending.failed(one, error)
        await desk.settled()

        [result], [reward], [dead] = (
            await hand.results("r1"),
            await hand.rewards("r1"),
            await desk.dead(),
        )
        assert (result.outcome, result.reason, result.status) == (
            "failed",
            str(error),
            error.status,
        )
        assert (reward.outcome, reward.retryable) == ("failed", False)
        assert (dead.dead_reason, dead.dead_outcome) == (str(error), "failed")
        assert await hand.pending() == 0


class TestStopped:
    async def test_the_fenced_say_nothing(self, desk, hand):
        """It was never ours any more."""
        one = await desk.running()

        desk.ending.stopped(one, FENCED)
        await desk.settled()

        assert desk.gone == [one]
        assert await hand.rewards("r1") == []
        assert await desk.state() == "assigned"

    async def test_the_returned_are_tried_elsewhere(self, desk, hand):
        """A drain, an engine that is away."""
        one = await desk.running()

        desk.ending.stopped(one, Stop("returned", "drained"))
        await desk.settled()

        [reward] = await hand.rewards("r1")
        assert (reward.outcome, reward.reason) == ("returned", "drained")
        assert await desk.state() == "waiting"

    @pytest.mark.parametrize(
        ("stop", "reason"),
        [
            (Stop("cancelled", "not wanted"), "not wanted"),
            (Stop("cancelled"), "cancelled"),
            (Stop("expired", "too late"), "too late"),
        ],
    )
    async def test_the_unwanted_end(self, desk, hand, stop, reason):
        """With a record that says why; they are not dead, for nobody should send them again."""
        one = await desk.running()

        desk.ending.stopped(one, stop)
        await desk.settled()

        [result] = await hand.results("r1")
        assert (result.outcome, result.reason, result.body) == (stop.kind, reason, b"")
        assert await desk.dead() == []
        assert await hand.pending() == 0

    async def test_silence_is_a_failure(self, desk):
        """It is the engine's, and comes as an error."""
        with pytest.raises(AssertionError):
            desk.ending.stopped(await desk.running(), Stop("silent", "for 30 s"))


class TestHandedBack:
    async def test_who_was_fenced_hands_nothing_back(self, desk, hand):
        """It was taken back already, and stands in line once."""
        one = await desk.running()
        await hand.reclaim("r1")

        desk.ending.give_back(one, "late")
        await desk.settled()

        assert await hand.rewards("r1") == []
        assert desk.gone == [one]
        assert desk.counted("fenced") == 1
        assert desk.counted("returned", endpoint="e0") == 0

    async def test_a_prefill_leg_leaves_its_kv(self, desk, hand):
        """Where it is lies apart, for as long as it is of use and the clocks may differ; the reward has a claim."""
        one = await desk.running(job_leg="prefill")
        one.kv_params = b'{"at":1}'

        desk.ending.prefilled(one)
        await desk.settled()

        [reward] = await hand.rewards("r1")
        assert (reward.outcome, reward.leg, reward.kv_params) == ("prefilled", "prefill", CLAIM)
        key = hand.keys.kv("r1")
        assert await hand.redis.command("GET", key) == b'{"at":1}'
        left_s = await hand.redis.command("PTTL", key) / 1e3
        assert KV_S < left_s <= 2 * KV_S
        assert await desk.state() == "waiting"
        assert desk.gone == [one]
        assert desk.counted("prefilled", endpoint="e0") == 1
        assert desk.counted("returned", endpoint="e0") == 0

    async def test_one_that_failed_leaves_none(self, desk, hand):
        """Whatever its engine had said before."""
        one = await desk.running(job_leg="prefill")
        one.kv_params = b'{"at":1}'

        desk.ending.failed(one, EngineError("broken"))
        await desk.settled()

        assert await hand.redis.command("EXISTS", hand.keys.kv("r1")) == 0
        [reward] = await hand.rewards("r1")
        assert reward.kv_params == b""
