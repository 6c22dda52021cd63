"""What every policy must keep, built in or plugged in; then what each is for."""

import itertools
import math

import msgspec
import pytest

from scheduler.policies import BUILT_IN, Edf, Fcfs, Policy, Urgency, union


@pytest.mark.parametrize("policy", [cls() for cls in BUILT_IN], ids=lambda p: p.label)
class TestEveryPolicy:
    def test_is_chosen_by_its_name(self, policy):
        """Its tag is its name, and its fields are its settings, with defaults."""
        assert msgspec.convert({"name": policy.label}, union()) == policy

    def test_refuses_a_setting_it_does_not_have(self, policy):
        """A typo in the settings is an error, never ignored."""
        with pytest.raises(msgspec.ValidationError, match="no_such"):
            msgspec.convert({"name": policy.label, "no_such": 1}, union())

    def test_ranks_everything_finitely_and_the_same_each_time(self, policy):
        """I6: a rank is a pure, finite number, with or without a promise."""
        for due_at, priority in itertools.product((5.0, math.inf), (-3, 0, 3)):
            rank = policy.rank(enqueued_at=1.0, due_at=due_at, priority=priority, work_s=0.1)
            assert math.isfinite(rank)
            assert rank == policy.rank(
                enqueued_at=1.0, due_at=due_at, priority=priority, work_s=0.1
            )

    def test_starves_nobody_by_rank(self, policy):
        """Whoever waits is passed in the end: late enough newcomers rank behind, whatever their priority."""
        old = policy.rank(enqueued_at=0.0, due_at=math.inf, priority=-3, work_s=0.1)

        assert policy.rank(enqueued_at=1e4, due_at=1e4 + 0.1, priority=3, work_s=0.1) > old

    def test_asks_for_sane_terms(self, policy):
        """Odds and shares are parts of one."""
        assert 0 <= policy.terms.odds_min <= 1
        assert 0 <= policy.terms.aside_share <= 1


def test_edf_takes_the_earliest_due():
    """And what has no promise, as if it had the patience."""
    edf = Edf(patience_s=10.0)

    assert edf.rank(enqueued_at=3.0, due_at=4.0, priority=9, work_s=0.1) == 4.0
    assert edf.rank(enqueued_at=3.0, due_at=math.inf, priority=9, work_s=0.1) == 13.0


def test_a_level_of_priority_is_worth_a_band():
    """Two levels, two bands: no wall."""
    urgency = Urgency(band_s=5.0, head_start=0.0)

    assert urgency.rank(enqueued_at=0.0, due_at=20.0, priority=2, work_s=0.1) == 10.0


def test_who_takes_most_of_its_promise_goes_ahead():
    """3 of 5 s come before who is due 1.5 s sooner and takes little; with a minute to spare it is due when it is due."""
    urgency = Urgency()

    def rank(promised_s, work_s):
        return urgency.rank(enqueued_at=0.0, due_at=promised_s, priority=0, work_s=work_s)

    assert rank(5.0, 3.0) < rank(3.5, 0.1)
    assert rank(60.0, 3.0) > 59.0
    assert rank(5.0, 1e9) == rank(5.0, 5.0), "a hopeless one goes no further ahead"
    assert Urgency(head_start=0.0).rank(enqueued_at=0.0, due_at=5.0, priority=0, work_s=3.0) == 5.0


def test_fcfs_asks_the_plan_for_nothing():
    """I10: the baseline sets nobody aside and keeps no share."""
    assert (Fcfs().terms.odds_min, Fcfs().terms.aside_share) == (0.0, 0.0)


def test_a_plug_in_joins_the_union():
    """A policy from elsewhere is chosen by its name like any other."""

    class Lifo(Policy, frozen=True, tag="lifo"):
        def rank(self, *, enqueued_at, due_at, priority, work_s):
            return -enqueued_at

    assert isinstance(msgspec.convert({"name": "lifo"}, union((Lifo,))), Lifo)
