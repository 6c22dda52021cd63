"""One attempt at a request: what it counts, what of it reaches the token log, and what its end says of it."""

import asyncio
import math

import msgspec
import pytest
from attempts import held

from workers.attempt import FENCED, Stop
from workers.body import NOTHING, Written
from workers.halves import CLAIM

ENQUEUED_AT, PULLED_AT = 1000.0, 1001.0


def attempt(**fields):
    usual = {"attempt": 2, "epoch": 7, "enqueued_at": ENQUEUED_AT, "decided_at": 1000.5}
    return held(pulled_at=PULLED_AT, **usual | fields)


def event(**fields):
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def said(text, finish=None):
    return event(choices=[{"text": text, "finish_reason": finish}])


def usage(n_out, n_in=10, **more):
    return event(usage={"completion_tokens": n_out, "prompt_tokens": n_in} | more)


def answered(*parts, first_tick=10.0, last_tick=14.5, **fields):
    """Admitted at tick 8, heard from the first tick to the last."""
    one = attempt(**fields)
    one.stage = "running"
    one.admitted_at, one.admitted_tick = 1002.0, 8.0
    one.first_token_at, one.first_tick, one.last_tick = 1004.0, first_tick, last_tick
    for part in parts:
        one.answer.feed(part)
    return one


EARLIER = Written(text="so far", pieces=3, output_tokens=5, first_token_at=1000.25)
"What an earlier attempt has left in the token log."


class TestCounts:
    def test_the_engine_counts_best(self):
        """The prompt is as long as the engine says, before that as the dispatcher knows, before that as its bytes tell."""
        asked = {"body": b"x" * 400, "prompt_tokens": 0}
        assert attempt(**asked).prompt_tokens == 100
        assert attempt(**asked | {"prompt_tokens": 30}).prompt_tokens == 30
        assert answered(usage(1, n_in=10), **asked).prompt_tokens == 10
        assert answered(usage(1, n_in=0), **asked).prompt_tokens == 100

    def test_what_is_continued_is_prompt_to_the_engine(self):
        """It reads what earlier attempts said; its own count has that in it already."""
        assert attempt(prompt_tokens=30, written=EARLIER).prompt_tokens == 35
        assert answered(usage(1, n_in=35), prompt_tokens=30, written=EARLIER).prompt_tokens == 35

    @pytest.mark.parametrize(
        ("leg", "cached", "uncached"),
        [
            pytest.param("whole", 12, 18, id="the rest"),
            pytest.param("whole", 30, 1, id="the last token is always computed"),
            pytest.param("whole", 99, 1, id="more than there is"),
            pytest.param("decode", 0, 1, id="its KV comes over the link"),
        ],
    )
    def test_what_must_be_computed(self, leg, cached, uncached):
        """What the dispatcher believes cached is not; at least one token is."""
        assert attempt(prompt_tokens=30, cached_tokens=cached, leg=leg).uncached_tokens == uncached

    def test_pieces_stand_for_tokens_until_the_engine_counts(self):
        """Those logged and those that gather, of this attempt alone."""
        one = answered(said("a"), said("b"), stream=True, written=EARLIER)
        assert (one.new_tokens, one.output_tokens) == (2, 5)
        one.piece()
        one.answer.feed(said("c"))
        assert one.new_tokens == 3

        one.answer.feed(usage(4))

        assert (one.new_tokens, one.output_tokens) == (4, 9)

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            pytest.param({}, 200.0, id="as long as usual"),
            pytest.param({"expected_tokens": 50}, 50.0, id="as the request says"),
            pytest.param(
                {"parsed": {"max_tokens": 20}}, 20.0, id="never beyond the client's limit"
            ),
            pytest.param({"parsed": {"max_tokens": 900}}, 200.0, id="a limit is no wish"),
            pytest.param({"written": EARLIER}, 195.0, id="less what is written"),
            pytest.param({"written": EARLIER, "expected_tokens": 5}, 1.0, id="one more comes"),
            pytest.param({"leg": "prefill", "expected_tokens": 50}, 1.0, id="for nobody"),
        ],
    )
    def test_how_long_its_answer_will_be(self, fields, expected):
        """Of this attempt: what the request says goes before what is usual."""
        one = attempt(**fields)

        one.expect(200.0)

        assert one.expected_tokens == expected

    def test_its_kv_is_of_concern_until_it_runs(self):
        """Once the engine has fetched it, or is about to, its age is the engines' affair."""
        one = attempt(leg="decode", kv_until_at=1020.0)
        assert one.kv_until_at == 1020.0

        one.stage = "running"

        assert one.kv_until_at is None


class TestAdmission:
    def test_without_promises_nothing_presses(self):
        """It is as any other, and waits since it was pulled."""
        seen = attempt(prompt_tokens=30, cached_tokens=10, weight=2.0, priority=-3).candidate()

        assert (seen.tpot_s, seen.due_at) == (math.inf, math.inf)
        assert (seen.prompt_tokens, seen.uncached_tokens) == (30, 20)
        assert (seen.held_at, seen.weight, seen.priority) == (PULLED_AT, 2.0, -3)

    def test_a_first_token_is_due_once(self):
        """By its promise; where an earlier attempt has shown one to the client, no more."""
        promised = {"ttft_s": 2.0, "tpot_s": 0.05}
        assert attempt(**promised).candidate().due_at == ENQUEUED_AT + 2.0
        assert attempt(**promised).candidate().tpot_s == 0.05

        assert attempt(**promised, written=EARLIER).candidate().due_at == math.inf

    def test_a_member_decodes_from_its_first_token_on(self):
        """Before it the prompt is still to be computed; after it the engine has only the answer to say."""
        one = answered(said("a"), said("b"), first_tick=10.0, prompt_tokens=30, tpot_s=0.5)
        one.expected_tokens = 8.0
        seen = one.member(10.25)
        assert (seen.context_tokens, seen.remaining_tokens, seen.prefill_tokens) == (32, 6.0, 0.0)
        assert seen.banked_s == pytest.approx(0.5 - 0.25)

        one.first_token_at = None

        assert one.member(10.25).prefill_tokens == 30


class TestLog:
    def test_each_piece_is_logged_once_and_where_it_belongs(self):
        """Entries go on where the earlier attempts' end, and count what they hold."""
        one = answered(said("a"), said("b"), usage(2), stream=True, written=EARLIER)
        entry = one.piece()
        assert (entry.index, entry.text, entry.attempt, entry.pieces) == (3, "ab", 2, 2)
        assert entry.output_tokens == 7
        assert one.piece() is None

        one.answer.feed(said("c"))

        entry = one.piece()
        assert (entry.index, entry.text, entry.pieces) == (5, "c", 1)
        assert one.pieces == 6

    async def test_torn_text_is_another_attempts(self):
        """What was dropped would leave a hole: nothing that follows is logged, and the request goes back."""
        one = answered(said("a"), stream=True)
        one.task = asyncio.create_task(asyncio.Event().wait())
        one.tear("no room")
        one.answer.feed(said("b"))

        assert one.piece() is None
        assert one.answer.fresh_text == ["b"], "the first is gone, not only kept back"
        assert one.stop == Stop("returned", "no room")
        with pytest.raises(asyncio.CancelledError):
            await one.task

    async def test_the_first_reason_to_stop_stays(self):
        """Its task is cancelled once: a second cancel would be somebody else's. Held back it has none."""
        waiting = attempt()
        waiting.halt(FENCED)
        assert waiting.stop is FENCED
        one = attempt()
        one.task = asyncio.create_task(asyncio.Event().wait())

        one.halt(Stop("cancelled", "not wanted"))
        one.halt(FENCED)

        assert one.stop == Stop("cancelled", "not wanted")
        assert one.task.cancelling() == 1
        with pytest.raises(asyncio.CancelledError):
            await one.task


def completed(one, finished_at=1010.0):
    return one.result("completed", "", 0, finished_at)


class TestResult:
    def test_a_success_holds_the_answer(self):
        """As the engine says it, under the name of who served it."""
        one = answered(said("hi", "stop"), usage(4, prompt_tokens_details={"cached_tokens": 6}))

        result = completed(one)

        assert (result.outcome, result.status, result.finish_reason) == ("completed", 200, "stop")
        assert (result.endpoint, result.attempt, result.id) == ("e0", 2, "r1")
        assert (result.prompt_tokens, result.cached_tokens, result.output_tokens) == (10, 6, 4)
        assert (result.enqueued_at, result.finished_at) == (ENQUEUED_AT, 1010.0)
        assert msgspec.json.decode(result.body)["choices"][0]["text"] == "hi"

    def test_a_failure_holds_none(self):
        """Half an answer is none; the engine's status says whose fault it was."""
        result = answered(said("hi", "stop"), usage(4)).result("failed", "broken", 503, 1010.0)

        assert (result.outcome, result.reason, result.status) == ("failed", "broken", 503)
        assert (result.finish_reason, result.body) == ("", b"")

    def test_where_all_was_said_before_its_length_ended_it(self):
        """No engine was asked: earlier attempts had said all that was allowed."""
        result = completed(attempt(written=EARLIER))

        assert (result.finish_reason, result.output_tokens) == ("length", 5)
        assert result.first_token_at == EARLIER.first_token_at
        assert msgspec.json.decode(result.body)["choices"][0]["text"] == "so far"

    def test_times_are_the_clients(self):
        """The first token is the one that the client saw first; the pace counts from there, gaps included."""
        alone = completed(answered(usage(4)))
        assert (alone.first_token_at, alone.ttft_s) == (1004.0, 4.0)
        assert alone.tpot_s == 1.5, "4.5 seconds between the first and the last of four"

        result = completed(answered(usage(4), written=EARLIER))
        assert (result.first_token_at, result.ttft_s) == (1000.25, 0.25)
        assert result.tpot_s == pytest.approx((1010.0 - 1000.25) / 8)

    @pytest.mark.parametrize(
        ("written", "n_out"),
        [(NOTHING, 1), (Written(pieces=1, output_tokens=1, first_token_at=1000.25), 0)],
    )
    def test_one_token_has_no_pace(self, written, n_out):
        """Whoever said it."""
        assert completed(answered(usage(n_out), written=written)).tpot_s is None

    def test_two_tokens_have_one(self):
        """A second attempt that says one token after the first attempt's one: the gap between them is the pace."""
        one = answered(usage(1), written=Written(pieces=1, output_tokens=1, first_token_at=1000.25))

        assert completed(one).tpot_s == 1010.0 - 1000.25

    def test_without_a_first_token_there_are_no_times(self):
        """It ended before: an expiry, a cancel."""
        result = attempt().result("cancelled", "not wanted", 0, 1010.0)

        assert (result.first_token_at, result.ttft_s, result.tpot_s) == (None, None, None)

    @pytest.mark.parametrize(
        ("promises", "is_kept"),
        [
            pytest.param({}, None, id="nothing was promised"),
            pytest.param({"ttft_s": 4.0}, True, id="first token just in time"),
            pytest.param({"ttft_s": 3.9}, False, id="first token late"),
            pytest.param({"tpot_s": 1.5}, True, id="pace just kept"),
            pytest.param({"tpot_s": 1.4}, False, id="too slow"),
            pytest.param({"deadline_at": 1010.0}, True, id="done at the deadline"),
            pytest.param({"deadline_at": 1009.0}, False, id="done too late"),
            pytest.param({"ttft_s": 9.0, "tpot_s": 1.0}, False, id="one of two broken"),
        ],
    )
    def test_every_promise_counts(self, promises, is_kept):
        """First token 4 s after the enqueue, 1.5 s a token, done after 10."""
        one = answered(said("hi", "stop"), usage(4), **promises)

        assert completed(one).on_time is is_kept
        assert self.of_reward(one, "completed").on_time is is_kept

    def test_who_does_not_complete_breaks_every_promise(self):
        """However early that was."""
        one = answered(ttft_s=9.0, deadline_at=9999.0)

        assert one.result("failed", "broken", 500, 1010.0).on_time is False
        assert attempt(ttft_s=9.0).result("completed", "", 0, 1010.0).on_time is False, "no token"

    def test_one_token_keeps_every_pace(self):
        """There is nothing to be slow at."""
        assert completed(answered(usage(1), tpot_s=0.001)).on_time is True

    @staticmethod
    def of_reward(one, outcome):
        return one.reward(outcome, "", 1010.0, retryable=False, hardware="a100")


class TestReward:
    @staticmethod
    def of(one, outcome="completed", **fields):
        fields = {"retryable": False, "hardware": "a100"} | fields
        return one.reward(outcome, "why", 1010.0, **fields)

    def test_it_says_what_this_attempt_cost(self):
        """By its own first token, whatever earlier attempts have said."""
        one = answered(usage(4, n_in=15), written=EARLIER, leg="whole", prefill_s=0.75, tenant="t")
        one.gap_max_s = 3.0

        reward = self.of(one, retryable=True)

        assert (reward.endpoint, reward.epoch, reward.attempt, reward.leg) == ("e0", 7, 2, "whole")
        assert (reward.outcome, reward.reason, reward.retryable) == ("completed", "why", True)
        assert (reward.hardware, reward.tenant, reward.model) == ("a100", "t", "m")
        assert (reward.decided_at, reward.pulled_at) == (1000.5, PULLED_AT)
        assert (reward.admitted_at, reward.first_token_at, reward.finished_at) == (
            1002.0,
            1004.0,
            1010.0,
        )
        assert (reward.prefill_s, reward.predicted_s) == (2.0, 0.75)
        assert (reward.ttft_s, reward.tpot_s, reward.gap_max_s) == (4.0, 1.5, 3.0)
        assert (reward.prompt_tokens, reward.output_tokens) == (15, 4)
        assert reward.cached_tokens is None, "the engine does not say, which is not nothing"
        assert reward.kv_params == b""

    def test_what_never_ran_cost_nothing(self):
        """What was not measured is absent, never 0."""
        reward = self.of(attempt(), "returned")

        assert (reward.admitted_at, reward.first_token_at) == (None, None)
        assert (reward.prefill_s, reward.predicted_s, reward.queue_s) == (None, None, None)
        assert (reward.ttft_s, reward.tpot_s, reward.gap_max_s) == (None, None, None)
        assert (reward.prompt_tokens, reward.output_tokens) == (0, 0)

    def test_what_was_admitted_and_never_spoke(self):
        """It has no time to its first token."""
        one = answered()
        one.first_token_at = None

        assert self.of(one, "returned").prefill_s is None

    @pytest.mark.parametrize(("queue_ms", "queue_s"), [(500.0, 0.5), (-3.0, 0.0), (9e9, 2.0)])
    def test_an_engines_own_times_fit_in_what_was_seen(self, queue_ms, queue_s):
        """Two seconds passed from the admission to the first token."""
        one = answered(event(metrics={"queue_time_ms": queue_ms}), usage(1))

        assert self.of(one).queue_s == queue_s

    def test_an_engine_may_say_nothing_of_its_queue(self):
        """Metrics without that field are none of it; before a first token there is no time for a queue."""
        assert self.of(answered(event(metrics={}), usage(1))).queue_s is None
        one = answered(event(metrics={"queue_time_ms": 500.0}))
        one.first_token_at = None
        assert self.of(one).queue_s == 0.0

    def test_half_a_request_keeps_no_promise(self):
        """Its token is nobody's: the client's first comes from whoever decodes, and the KV is claimed in its place."""
        one = answered(usage(1), leg="prefill", ttft_s=9.0)

        reward = self.of(one, "prefilled")

        assert (reward.ttft_s, reward.on_time, reward.kv_params) == (None, None, CLAIM)
        assert reward.prefill_s == 2.0
