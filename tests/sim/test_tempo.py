"""Gaps between tokens: what the engine's steps gave, and what a mean over the answer hides."""

import numpy as np
import pytest
from test_instrument import crowd, lab, run

from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fate import Fate
from scheduler.sim.fleet import EndpointSpec, Fleet
from scheduler.sim.workload import Arrival

# So little room that answers which grow together preempt each other.
TIGHT = EndpointSpec(profile="a30", count=2, engine=EngineSettings(kv_tokens=12_000))
PAIR = Fleet(name="tight", endpoints=(TIGHT,))


def fate(moments, **promise):
    one = Fate(0, Arrival(at_s=10.0, prompt_tokens=1, output_tokens=len(moments), **promise))
    one.end = "completed"
    one.first_token_at, one.finished_at = moments[0], moments[-1]
    one.output_tokens = len(moments)
    one.tell(np.array(moments))
    return one


class TestGaps:
    @pytest.mark.parametrize("name", ["plan", "least-request"])
    def test_every_token_has_its_moment(self, name):
        """Under preemption too the gaps of an answer add up to the time from its first token to its last."""
        found, world = run(lab(PAIR, crowd(200)), name)

        assert name == "plan" or found.preemptions > 0
        for one in world.fates:
            if one.output_tokens > 1:
                assert one.tpot_s <= one.gap_worst_s <= one.gap_max_s <= one.finished_at

    def test_moments_are_the_steps(self, monkeypatch):
        """One moment a token, from the first to the last, whatever was preempted in between."""
        told = {}
        monkeypatch.setattr(Fate, "tell", lambda self, moments: told.update({self.row: moments}))
        found, world = run(lab(PAIR, crowd(200)), "least-request")

        assert found.preemptions > 0
        for one in world.fates:
            moments = told[one.row]
            assert len(moments) == one.output_tokens
            assert moments[0] == one.first_token_at
            assert moments[-1] == one.finished_at
            assert (np.diff(moments) > 0).all()


class TestDue:
    def test_a_stall_in_the_middle_is_late_though_the_mean_keeps_the_promise(self):
        """0.1 s a token is kept in the mean by ten tokens of which one came 0.5 s after its neighbour."""
        moments = [11.0, 11.05, 11.55, *(11.55 + 0.01 * n for n in range(1, 8))]
        one = fate(moments, tpot_s=0.1)

        assert one.keeps_tpot
        assert not one.keeps_tokens
        assert one.gap_max_s == pytest.approx(0.5)

    def test_a_first_token_before_its_time_is_credit(self):
        """Whoever was promised the first token at 2 s reads from then on."""
        moments = [11.0, 11.05, 11.55, *(11.55 + 0.01 * n for n in range(1, 8))]

        assert fate(moments, tpot_s=0.1, ttft_s=2.0).keeps_tokens
