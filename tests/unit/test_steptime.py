"""The step-time law: learned from gaps, bounded by sense, never thrown by one of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import steptime
from scheduler.steptime import Law, StepTime

TRUE = Law(base_s=0.012, sequence_s=1.5e-4, kv_s=2.4e-7, prefill_s=8e-5)


def samples(law, n, *, noise=0.0, seed=1):
    """Steps of a varied load, as an engine of this law takes them."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        n_sequences = int(rng.integers(1, 64))
        kv_tokens = float(n_sequences * rng.integers(100, 3000))
        prefill = float(rng.choice([0, 0, 0, 512, 2048]))
        step_s = law.step_s(n_sequences, kv_tokens, prefill)
        yield step_s * float(np.exp(noise * rng.normal())), n_sequences, kv_tokens, prefill


def learned(gaps, prior):
    """The step time after these gaps: measured seconds, batch, KV tokens, prefill tokens."""
    known = StepTime(prior)
    for measured_s, n, kv, prefill in gaps:
        known.learn(measured_s, batch=n, kv_tokens=kv, prefill_tokens=prefill)
    return known


def test_an_engine_begins_with_the_law_of_its_class_however_its_name_is_written():
    """The worker reads a declared class as the core does: a card's full name is no unknown hardware."""
    assert steptime.prior("NVIDIA A100-SXM4-80GB") == steptime.prior("a100")
    assert steptime.prior("a100") != steptime.prior("")


class TestLearning:
    def test_the_prior_holds_before_anything_was_seen(self):
        """An engine that has not decoded yet is predicted by its data sheet."""
        assert StepTime(TRUE).law == TRUE

    def test_a_wrong_prior_is_overcome(self):
        """Three hundred noisy steps bring predictions within 5 % of the truth, from four times too fast."""
        slow = Law(TRUE.base_s * 4, TRUE.sequence_s * 4, TRUE.kv_s * 4, TRUE.prefill_s * 4)

        law = learned(samples(slow, 300, noise=0.1), TRUE).law

        for n_sequences, kv_tokens, prefill in [(1, 500, 0), (32, 40_000, 0), (16, 8000, 2048)]:
            expected = slow.step_s(n_sequences, kv_tokens, prefill)
            assert law.step_s(n_sequences, kv_tokens, prefill) == pytest.approx(expected, rel=0.05)

    def test_a_few_gaps_say_how_fast_an_engine_is_that_nobody_declared(self):
        """Thirty-two noisy steps are enough, from five times too fast as from twice too slow."""
        for factor in (5.0, 0.5):
            unlike = Law(*(factor * c for c in (0.012, 1.5e-4, 2.4e-7, 8e-5)))

            law = learned(samples(unlike, 32, noise=0.1), TRUE).law

            expected = unlike.step_s(32, 40_000)
            assert law.step_s(32, 40_000) == pytest.approx(expected, rel=0.1)

    def test_what_did_not_vary_keeps_the_shape_of_the_prior(self):
        """A batch of always one cannot tell its parts apart: an engine twice as slow is so in all of them."""
        law = learned([(2 * TRUE.step_s(1, 500.0), 1, 500.0, 0.0)] * 200, TRUE).law

        assert law.step_s(1, 500.0) == pytest.approx(2 * TRUE.step_s(1, 500.0), rel=0.05)
        assert law.prefill_s == pytest.approx(2 * TRUE.prefill_s, rel=0.05)

    def test_it_forgets(self):
        """An engine that has become twice as slow is known as such a few seconds later."""
        slow = Law(*(2 * c for c in (TRUE.base_s, TRUE.sequence_s, TRUE.kv_s, TRUE.prefill_s)))
        known = learned([*samples(TRUE, 400), *samples(slow, 1000)], TRUE)

        assert known.law.step_s(32, 40_000) == pytest.approx(slow.step_s(32, 40_000), rel=0.1)

    def test_no_term_vanishes(self):
        """Gaps that seem to shrink as contexts grow do not make KV free: the batch would lose its bound."""
        backwards = [(0.03 - 1e-8 * kv, 16, float(kv), 0.0) for kv in range(10_000, 60_000, 500)]

        level = 0.03 / TRUE.step_s(16, 35_000)
        assert learned(backwards * 3, TRUE).law.kv_s == pytest.approx(
            level * TRUE.kv_s / 8, rel=0.1
        )

    def test_one_stall_moves_little(self):
        """A gap of two seconds among steps of 20 ms is no step."""
        known = learned(samples(TRUE, 200), TRUE)
        before = known.law.step_s(32, 40_000)

        known.learn(2.0, batch=32, kv_tokens=40_000)

        assert known.law.step_s(32, 40_000) == pytest.approx(before, rel=0.05)

    @pytest.mark.parametrize("gap_s", [0.0, -1.0, 61.0, float("nan")])
    def test_what_is_no_gap_is_left_out(self, gap_s):
        """Clocks that jump and engines that hang teach nothing."""
        known = StepTime(TRUE)

        known.learn(gap_s, batch=1, kv_tokens=10)

        assert (known.samples, known.law) == (0, TRUE)

    def test_the_error_is_that_of_predictions_before_their_lesson(self):
        """It tells how far to trust the law."""
        known = learned(samples(TRUE, 300, noise=0.1), TRUE)

        assert 0.02 < known.error < 0.2


GAPS = st.tuples(st.floats(1e-5, 60), st.integers(1, 512), st.floats(0, 2e6), st.floats(0, 8192))


@given(st.lists(GAPS, max_size=40))
def test_the_law_stays_sane_whatever_it_is_told(gaps):
    """Finite, never negative, growing in every term."""
    law = learned(gaps, Law()).law

    parts = [law.base_s, law.sequence_s, law.kv_s, law.prefill_s]
    assert all(np.isfinite(part) and part >= 0.0 for part in parts)
