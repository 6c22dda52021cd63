"""Bounds are right on small cases and never crossed by any policy."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from test_instrument import PAIR, crowd, lab, poisson, run

from scheduler.sim import bounds

JOBS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=7)


def fits(jobs, allowed):
    """Whether one server can end them all within `allowed` of their arrival: in order of arrival, which is best."""
    now = 0
    for at, work in jobs:
        now = max(now, at) + work
        if now > at + allowed:
            return False
    return True


@given(jobs=JOBS, allowed=st.integers(1, 8))
def test_most_on_time_is_the_exact_optimum(jobs, allowed):
    """Against trying every subset."""
    jobs = sorted(jobs)
    best = max(
        n
        for n in range(len(jobs) + 1)
        if any(fits(some, allowed) for some in combinations(jobs, n))
    )

    at_s, work = np.array(jobs, dtype=float).T
    assert bounds.most_on_time(at_s, work, float(allowed)) == best


def test_srpt_interrupts():
    """4 s from 0, 1 s from 1: the short one goes first, 5 and 1 seconds in the system."""
    assert bounds.srpt_mean_s(np.array([0.0, 1.0]), np.array([4.0, 1.0])) == 3.0


@pytest.mark.parametrize("name", ["plan", "oracle", "sjf", "edf-drop"])
def test_no_policy_beats_the_bounds(name):
    """On the same machines, with caches, jitter and noise."""
    alone = [structs.replace(row, blocks=()) for row in crowd(250, ttft_s=2.0)]
    stage = lab(PAIR, alone)
    found, _ = run(stage, name)
    limit = stage.bounds(0, found.rate_rps)

    if found.n_completed == found.n:  # who drops the long ones has a mean of the short ones
        assert found.ttft_mean_s > limit.ttft_mean_s
    assert found.on_time <= limit.on_time < 1.0


def test_a_run_in_is_not_what_the_bounds_are_of():
    """A crowd that is left out of the figures, and minutes later who is alone: bounds of those alone."""
    busy = poisson([3000] * 150, 15.0, seed=4)
    calm = [structs.replace(row, at_s=row.at_s + 120.0) for row in poisson([500] * 50, 1.0, seed=5)]
    promised = [structs.replace(row, ttft_s=1.0) for row in [*busy, *calm]]
    stage = lab(PAIR, promised, cut=0.75)

    found, _ = run(stage, "fcfs")
    limit = stage.bounds(0, found.rate_rps)

    assert found.n == 50
    assert limit.ttft_mean_s < found.ttft_mean_s < 1.0
    assert found.on_time == limit.on_time == 1.0
