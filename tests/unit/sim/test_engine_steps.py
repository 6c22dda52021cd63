"""What one step of the engine does, in vLLM's terms."""

import numpy as np
import pytest

from scheduler.sim import profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.engine import Engine
from scheduler.sim.refusal import QueueFullError
from scheduler.sim.sequence import Sequence

A100 = profile.load("a100")


def engine(rng=None, **settings):
    return Engine(A100, EngineSettings(**{"block_size": 16, **settings}), rng)


def sequence(name, prompt=32, output=4, **more):
    return Sequence(name, prompt_tokens=prompt, output_tokens=output, **more)


def run(an_engine, now=0.0):
    """All steps to the end."""
    steps = []
    while (step := an_engine.step(now)) is not None:
        steps.append(step)
        now = step.ended_at
    return steps


def ids(sequences):
    return [one.id for one in sequences]


class TestTokens:
    def test_a_prompt_then_one_token_a_step(self):
        """The step that ends the prompt yields the first token; each later step one more."""
        one = sequence("a", prompt=100, output=3)
        an_engine = engine()
        an_engine.add(one)

        steps = run(an_engine, now=5.0)

        assert [step.new_tokens for step in steps] == [100, 1, 1]
        assert ids(steps[0].prefilled) == ids(steps[2].finished) == ["a"]
        assert one.first_token_at == steps[0].ended_at
        assert one.finish_reason == "stop"
        first_s = A100.step_s(1, 100, 100 * 100 // 2)
        assert steps[0].duration_s == pytest.approx(first_s, rel=1e-6)
        assert steps[1].duration_s == pytest.approx(A100.step_s(1, 1, 0, 101), rel=1e-6)

    @pytest.mark.parametrize(
        ("output", "max_tokens", "expected", "reason"),
        [(5, 3, 3, "length"), (3, 3, 3, "stop"), (2, None, 2, "stop")],
    )
    def test_ends_by_itself_or_by_its_limit(self, output, max_tokens, expected, reason):
        """Whichever comes first; a tie is the text's own end."""
        one = sequence("a", output=output, max_tokens=max_tokens)
        an_engine = engine()
        an_engine.add(one)

        run(an_engine)

        assert (one.output_tokens, one.finish_reason) == (expected, reason)

    def test_a_long_prompt_is_chunked_to_the_budget_beside_decodes(self):
        """Decodes take their token first, the prompt gets what is left of the budget."""
        an_engine = engine(max_num_batched_tokens=64, max_num_seqs=4)
        an_engine.add(sequence("decode", prompt=16, output=9))
        first = an_engine.step(0.0)
        an_engine.add(sequence("long", prompt=150, output=1))

        second, third, fourth = run(an_engine, first.ended_at)[:3]

        assert [step.new_tokens for step in (second, third, fourth)] == [64, 64, 1 + 150 - 2 * 63]
        assert ids(fourth.finished) == ["long"]

    def test_the_threshold_lets_short_prompts_pass_long_ones(self):
        """A long prompt takes at most the threshold of each step; the rest goes to the next in line."""
        an_engine = engine(max_num_batched_tokens=300, long_prefill_token_threshold=100)
        for name, prompt in (("long", 250), ("short", 50)):
            an_engine.add(sequence(name, prompt=prompt))

        first = an_engine.step(0.0)

        assert (first.new_tokens, ids(first.prefilled)) == (150, ["short"])

    def test_without_chunking_a_prompt_waits_for_a_budget_that_holds_it(self):
        """It shares no step it does not fit in whole."""
        an_engine = engine(chunked_prefill=False, max_num_batched_tokens=100, max_num_seqs=8)
        for name in ("a", "b"):
            an_engine.add(sequence(name, prompt=60))

        first, second = run(an_engine)[:2]

        assert (ids(first.scheduled), ids(second.scheduled)) == (["a"], ["b"])


class TestOrder:
    def test_slots_fill_in_order_of_arrival(self):
        """`max_num_seqs` run, the others wait for a slot."""
        an_engine = engine(max_num_seqs=2)
        for name in "abc":
            an_engine.add(sequence(name))

        steps = run(an_engine)

        assert ids(steps[0].scheduled) == ["a", "b"]
        assert ids(next(step for step in steps[1:] if step.scheduled).scheduled) == ["c"]

    def test_priority_orders_the_line_and_never_takes_a_slot(self):
        """Lower goes first among those that wait; who runs, stays."""
        an_engine = engine(max_num_seqs=1, scheduling_policy="priority")
        an_engine.add(sequence("running", priority=10))
        step = an_engine.step(0.0)
        for name, priority in (("low", 5), ("high", -5), ("late", 5)):
            an_engine.add(sequence(name, priority=priority))

        started = [ids(later.scheduled) for later in run(an_engine, step.ended_at)]

        assert [names[0] for names in started if names] == ["high", "low", "late"]
        assert an_engine.counters.preemptions == 0


class TestShortage:
    def shortage(self, **settings):
        """Two requests that fit as prompts and not as answers: 8 blocks, 3 + 3, growing to 6 + 6."""
        an_engine = engine(kv_tokens=8 * 16, **settings)
        first = sequence("first", prompt=48, output=48, priority=9)
        second = sequence("second", prompt=48, output=48, priority=0, arrived_at=1.0)
        for one in (first, second):
            an_engine.add(one)
        return an_engine, first, second

    def test_the_last_to_run_is_preempted_and_computed_again(self):
        """Its tokens are not lost: what it said is recomputed, and it says the rest."""
        an_engine, first, second = self.shortage()

        steps = run(an_engine)

        assert (first.preemptions, second.preemptions) == (0, 1)
        assert first.finished_at < second.finished_at
        assert second.output_tokens == 48
        again = next(step for step in steps[1:] if step.scheduled)
        assert again.new_tokens > 48

    def test_under_priority_the_least_urgent_is_the_victim(self):
        """The higher number, however long it has run."""
        an_engine, first, second = self.shortage(scheduling_policy="priority")

        run(an_engine)

        assert (first.preemptions, second.preemptions) == (1, 0)

    def test_a_victim_gives_back_the_block_of_the_very_step(self):
        """A decode has just been given its third block when an urgent prompt needs one."""
        an_engine = engine(
            kv_tokens=8 * 16,
            max_num_batched_tokens=17,
            max_num_seqs=4,
            scheduling_policy="priority",
            reserve_full_isl=False,
        )
        an_engine.add(sequence("patient", prompt=16, output=100, priority=9))
        for _ in range(12):
            an_engine.step(0.0)
        an_engine.add(sequence("urgent", prompt=120, output=1))
        steps = [an_engine.step(0.0) for _ in range(6)]

        assert ids(steps[-1].preempted) == ["patient"]
        assert steps[-1].new_tokens == 16
        assert an_engine.kv.used == 6
        run(an_engine)
        assert an_engine.kv.used == 0

    def test_a_prompt_waits_until_all_of_it_fits(self):
        """Unless told otherwise, no prompt starts that its blocks may not hold."""
        an_engine = engine(kv_tokens=8 * 16)
        an_engine.add(sequence("a", prompt=80, output=2))
        an_engine.add(sequence("b", prompt=80, output=2))

        assert ids(an_engine.step(0.0).scheduled) == ["a"]
        assert an_engine.n_waiting == 1

    def test_what_can_never_fit_is_refused(self):
        """It would preempt itself for ever."""
        with pytest.raises(ValueError, match="grows to 129 tokens, the KV cache holds 128"):
            engine(kv_tokens=128).add(sequence("a", prompt=100, output=29))


class TestPrefix:
    def test_a_repeated_prompt_computes_only_its_last_block(self):
        """Even a whole hit computes something: 64 tokens are 4 blocks, 3 of them are reused."""
        an_engine = engine()
        keys = [1, 2, 3, 4]
        an_engine.add(sequence("a", prompt=64, keys=keys))
        run(an_engine)
        again = sequence("b", prompt=64, keys=keys)
        an_engine.add(again)

        step = run(an_engine)[0]

        assert (again.cached_tokens, step.new_tokens) == (48, 16)
        assert (an_engine.counters.prefix_queries, an_engine.counters.prefix_hits) == (128, 48)

    def test_a_hit_ends_at_the_first_other_block(self):
        """Later equal keys do not count."""
        an_engine = engine()
        an_engine.add(sequence("a", prompt=80, keys=[1, 2, 3, 4, 5]))
        run(an_engine)
        other = sequence("b", prompt=80, keys=[1, 2, 9, 4, 5])
        an_engine.add(other)

        an_engine.step(0.0)

        assert other.cached_tokens == 32

    def test_requests_share_a_prefix_that_is_still_being_computed(self):
        """Blocks count as cached from the step that computes them, as in vLLM."""
        an_engine = engine()
        for name in "ab":
            an_engine.add(sequence(name, prompt=64, keys=[1, 2, 3, 4]))

        assert an_engine.step(0.0).new_tokens == 64 + 16

    def test_the_next_turn_finds_the_answer_too(self):
        """Keys that go on over the output are cached when it ends."""
        an_engine = engine()
        an_engine.add(sequence("turn 1", prompt=32, output=33, keys=[1, 2, 3, 4]))
        run(an_engine)
        turn = sequence("turn 2", prompt=100, keys=[1, 2, 3, 4, 5, 6])
        an_engine.add(turn)

        an_engine.step(0.0)

        assert turn.cached_tokens == 64

    def test_switched_off_nothing_is_found(self):
        """And nothing is asked for."""
        an_engine = engine(prefix_caching=False)
        for name in "ab":
            an_engine.add(sequence(name, prompt=64, keys=[1, 2, 3, 4]))
            run(an_engine)

        assert (an_engine.counters.prefix_queries, an_engine.kv.cached) == (0, 0)

    def test_the_cache_is_forgotten_only_when_nobody_holds_it(self):
        """As vLLM refuses it."""
        an_engine = engine()
        an_engine.add(sequence("a", prompt=64, keys=[1, 2, 3, 4]))
        an_engine.step(0.0)

        assert not an_engine.reset_prefix_cache()
        run(an_engine)
        assert an_engine.reset_prefix_cache()
        assert an_engine.kv.cached == 0


class TestLimits:
    def test_a_full_engine_refuses_by_count(self):
        """Those that run count as well as those that wait."""
        an_engine = engine(max_num_seqs=1, max_num_queued_reqs=2)
        an_engine.add(sequence("runs"))
        an_engine.step(0.0)
        an_engine.add(sequence("waits"))

        with pytest.raises(QueueFullError, match="currently busy") as caught:
            an_engine.add(sequence("refused"))

        assert caught.value.reason == "max_num_queued_reqs"
        assert "refused" not in an_engine

    def test_a_full_engine_refuses_by_tokens(self):
        """Prompts without a first token count whole, the newcomer not at all."""
        an_engine = engine(max_num_queued_tokens=100)
        an_engine.add(sequence("a", prompt=60))
        an_engine.add(sequence("b", prompt=90))

        with pytest.raises(QueueFullError, match="prefill token backlog"):
            an_engine.add(sequence("c", prompt=1))

        an_engine.step(0.0)
        an_engine.add(sequence("d", prompt=500))


class TestPause:
    def test_a_pause_lets_the_running_end_and_holds_the_others(self):
        """Until `resume`."""
        an_engine = engine(max_num_seqs=1)
        for name in "ab":
            an_engine.add(sequence(name))
        an_engine.step(0.0)
        an_engine.pause(freeze=False)

        run(an_engine)
        assert (an_engine.n_running, an_engine.n_waiting) == (0, 1)

        an_engine.resume()
        assert ids(an_engine.step(9.0).scheduled) == ["b"]

    def test_a_freeze_stops_everything(self):
        """The running ones keep their place."""
        an_engine = engine()
        an_engine.add(sequence("a"))
        an_engine.step(0.0)
        an_engine.pause(freeze=True)

        assert an_engine.step(1.0) is None
        assert an_engine.n_running == 1


class TestNoise:
    def test_noise_keeps_the_mean_and_the_seed(self):
        """Log-normal with mean one; the same seed makes the same steps."""

        def ends(seed):
            noisy = engine(np.random.default_rng(seed), step_noise=0.1)
            noisy.add(sequence("a", prompt=16, output=800))
            return noisy, [step.ended_at for step in run(noisy)]

        noisy, first = ends(1)
        _, again = ends(1)
        calm = engine()
        calm.add(sequence("a", prompt=16, output=800))

        assert first == again
        assert noisy.counters.steps == 800
        assert first[-1] == pytest.approx(run(calm)[-1].ended_at, rel=0.02)

    def test_stalls_add_their_length(self):
        """A certain stall makes every step that much longer."""
        stalled = engine(np.random.default_rng(0), stall_probability=1.0, stall_s=0.2)
        stalled.add(sequence("a"))
        calm = engine()
        calm.add(sequence("a"))

        delay_s = stalled.step(0.0).duration_s - calm.step(0.0).duration_s

        assert delay_s == pytest.approx(0.2)

    def test_chance_needs_a_generator(self):
        """It is handed in, never drawn from the air."""
        with pytest.raises(ValueError, match=r"step noise 0.1 and stall probability 0.0 need"):
            engine(step_noise=0.1)


def test_a_slowed_engine_takes_that_much_longer():
    """A slowdown multiplies every step, leapt ones too."""
    slow, normal = engine(), engine()
    for one in (slow, normal):
        one.add(sequence("a", output=50))
    slow.durations.slowdown = 3.0

    slow_s = slow.step(0.0, 1e9).duration_s + slow.step(0.0, 1e9).duration_s
    normal_s = normal.step(0.0, 1e9).duration_s + normal.step(0.0, 1e9).duration_s

    assert slow_s == pytest.approx(3 * normal_s)


def test_settings_vllm_would_refuse_are_refused():
    """The message names the setting, what was found and what is wanted."""
    with pytest.raises(
        ValueError, match=r"max_num_batched_tokens is 8, at least max_num_seqs \(9\)"
    ):
        EngineSettings(max_num_seqs=9, max_num_batched_tokens=8)
