"""The bound of endpoints that serve one request each: never below what can be had, never above the pooled server's."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from test_bounds import fits
from test_instrument import PAIR, crowd, lab

from scheduler.sim import bounds, relaxation

JOBS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6
)


def most(jobs, allowed):
    """The most on time, by trying every request on every endpoint and on none."""
    n_endpoints = len(jobs[0]) - 1
    return max(
        sum(slot < n_endpoints for slot in slots)
        for slots in product(range(n_endpoints + 1), repeat=len(jobs))
        if all(
            fits(
                [
                    (job[0], job[1 + one])
                    for job, slot in zip(jobs, slots, strict=True)
                    if slot == one
                ],
                allowed,
            )
            for one in range(n_endpoints)
        )
    )


def bound(jobs, allowed, cells=(60,)):
    at_s, *work = np.array(jobs, dtype=float).T
    return relaxation.most_on_time(at_s, np.array(work).T, float(allowed), cells=cells)


def pooled(jobs, allowed):
    at_s, *work = np.array(jobs, dtype=float).T
    return bounds.most_on_time(at_s, bounds.pooled(np.array(work).T), float(allowed))


@settings(max_examples=60)
@given(jobs=JOBS, allowed=st.integers(1, 6))
def test_nothing_that_can_be_had_is_above_it(jobs, allowed):
    """Two endpoints that differ, each better at something; moments that fall between the cells' edges included."""
    jobs = sorted(jobs)
    best = most(jobs, allowed)
    assert best <= bound(jobs, allowed) <= best + 1
    assert best <= pooled(jobs, allowed)
    assert best <= bound(jobs, allowed, cells=(7, 13))


@given(jobs=JOBS, allowed=st.integers(1, 6))
def test_of_one_endpoint_it_is_the_exact_optimum(jobs, allowed):
    """As the greedy rule finds it, where all moments fall on edges of cells."""
    jobs = sorted(job[:2] for job in jobs)
    at_s, work = np.array(jobs, dtype=float).T
    assert bound(jobs, allowed) == bounds.most_on_time(at_s, work, float(allowed))


@given(
    jobs=st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 6)), min_size=1, max_size=7),
    cells=st.integers(2, 200),
)
def test_cells_only_add(jobs, cells):
    """However coarse they are, who was on time still is."""
    jobs = sorted(jobs)
    at_s, work = np.array(jobs).T
    exact = bounds.most_on_time(at_s, work, 4.0 - 1e-6)
    assert bound(jobs, 4.0, cells=(cells,)) >= exact


def test_a_prompt_is_not_split_over_endpoints():
    """Three of 2 s on two endpoints, 3 s promised: a pooled server ends the last of them at 3.0."""
    jobs = [(0, 2, 2)] * 3
    assert bound(jobs, 3) == 2
    assert pooled(jobs, 3) == 3


def test_what_each_endpoint_is_good_at_counts():
    """Two that are ten times as quick on one of two: to have both of them work on each would take 1.8 s."""
    jobs = [(0, 1, 10), (0, 10, 1)]
    assert bound(jobs, 1) == pooled(jobs, 1) == 2


def test_of_far_too_many_short_prompts_it_says_what_the_pooled_server_does():
    """There a prompt that is split gains nothing; prices must have been found."""
    rng = np.random.default_rng(1)
    at_s, work = (
        np.sort(rng.uniform(0, 9, 200)),
        np.outer(rng.uniform(0.1, 0.5, 200), [0.8, 1, 1.2]),
    )
    as_one = bounds.most_on_time(at_s, bounds.pooled(work), 2.0)
    assert as_one < 150
    assert as_one <= relaxation.most_on_time(at_s, work, 2.0) + 1 <= as_one + 3


@pytest.mark.parametrize("load", [8.0, 12.0])
def test_of_a_stage_it_is_at_most_the_pooled_bound(load):
    """On jittered machines."""
    stage = lab(PAIR, [structs.replace(row, blocks=()) for row in crowd(150, ttft_s=2.0)])
    found = stage.on_time_bound(0, load)
    assert 0.0 < found <= stage.bounds(0, load).on_time


def test_there_is_none_where_promises_differ():
    """Due moments would come in another order than arrivals."""
    rows = crowd(20, ttft_s=2.0)
    mixed = [structs.replace(row, ttft_s=1.0 + at % 2) for at, row in enumerate(rows)]
    assert lab(PAIR, mixed).on_time_bound(0, 5.0) is None
