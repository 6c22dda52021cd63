"""The plan of one step works on a room of its own: what it takes from it is what the ledger then says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cost import CLASSES
from scheduler.fleet import Capacities, Eligible
from scheduler.ledger import Ledger, Line, Rates
from scheduler.pace import Pace
from scheduler.room import Decodes, Room

HARDWARE = CLASSES["a100"], CLASSES["l40s"]
N = len(HARDWARE)
SEATS, KV = 4.0, 10_000.0
NOW = 7.0

given_to = st.lists(
    st.tuples(
        st.integers(0, N - 1),
        st.integers(1, 4000),  # tokens of prompt
        st.sampled_from([0.02, 0.05, 0.2, math.inf]),  # promised per token
        st.sampled_from([0.5, 1.0, 8.0]),  # worth
    ),
    max_size=6,
)


def line(tokens: int, tpot_s: float, weight: float) -> Line:
    pairs = 0.5 * tokens * tokens
    return Line(tokens=tokens, pairs=pairs, kv=1.5 * tokens, tpot_s=tpot_s, weight=weight)


def room(ledger: Ledger, pace: Pace) -> Room:
    """As a step begins with it."""
    rates = Rates(overhead_s=np.full(N, 0.01), token_s=np.full(N, 1e-4), pair_s=np.full(N, 1e-9))
    return Room(
        rates=rates,
        backlog=ledger.backlog(rates, NOW),
        seats=SEATS - ledger.seats,
        kv=KV - ledger.kv,
        capacities=Capacities.of(kv=np.full(N, KV), length=np.full(N, np.inf)),
        pins=ledger.pins,
        decodes=Decodes(
            lambda: pace.load(ledger.seats.copy(), ledger.read_kv.copy(), NOW),
            tightest_s=ledger.tightest_s,
            promised=ledger.promised,
            is_bound=ledger.bound > 0,
        ),
        eligible=Eligible.by(np.zeros(N)),
    )


@given(tokens=st.integers(1, 4000), part=st.floats(0, 0.9))
def test_a_head_progresses_in_tokens_and_in_pairs(tokens, part):
    """After a part of its predicted seconds, that part of them is done: so much less stands before a newcomer."""
    ledger = Ledger()
    for slot in range(N):
        ledger.open(slot)
    ledger.commit(0, "head", line(tokens, math.inf, 1.0), NOW)
    rates = Rates(overhead_s=np.full(N, 0.01), token_s=np.full(N, 1e-4), pair_s=np.full(N, 1e-7))
    work_s = tokens * 1e-4 + 0.5 * tokens * tokens * 1e-7

    left = ledger.backlog(rates, NOW + part * work_s)

    assert left.seconds(rates) == pytest.approx([(1 - part) * work_s, 0.0])


@given(before=given_to, chosen=given_to, is_asked=st.booleans())
def test_what_is_taken_in_a_step_is_what_the_next_begins_with(before, chosen, is_asked):
    """Seats, KV, seconds, pace and promises; and while the plan is made, the ledger does not move."""
    ledger, pace = Ledger(), Pace()
    for slot, hardware in enumerate(HARDWARE):
        ledger.open(slot)
        pace.open(slot, hardware)
    for number, (slot, *one) in enumerate(before):
        ledger.commit(slot, f"old{number}", line(*one), NOW)
    planned = room(ledger, pace)
    if is_asked:  # sums that are kept up to date from then on
        assert planned.used is not None
        assert planned.decodes.load is not None
    as_it_was = ledger._sums.copy()

    for slot, *one in chosen:
        made = line(*one)
        work_s = made.tokens * 1e-4 + made.pairs * 1e-9
        planned.take(slot, work_s, made)
        planned.decodes.pace_s(np.zeros(N))  # asked on the way, as for every request

    assert np.array_equal(ledger._sums, as_it_was)
    for number, (slot, *one) in enumerate(chosen):
        ledger.commit(slot, f"new{number}", line(*one), NOW)
    following = room(ledger, pace)
    assert np.allclose(planned.start_s, following.start_s)
    assert np.allclose(planned.open_s, following.open_s)
    assert np.allclose(planned.used, following.used)
    more_kv = np.full(N, 500.0)
    assert np.allclose(planned.decodes.pace_s(more_kv), following.decodes.pace_s(more_kv))
    for mine, theirs in (
        (planned.seats, following.seats),
        (planned.kv, following.kv),
        (planned.tokens, following.tokens),
        (planned.pairs, following.pairs),
        (planned.decodes.tightest_s, following.decodes.tightest_s),
        (planned.decodes.promised, following.decodes.promised),
    ):
        assert mine.tolist() == theirs.tolist()
    assert planned.decodes.is_bound == following.decodes.is_bound
    assert np.isclose(planned.earliest_s, (following.open_s + 0.01).min())
