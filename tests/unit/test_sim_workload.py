"""Workloads keep their bursts, their order and their conversations through every change."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.sim.summary import prefix_share, summary
from scheduler.sim.workload import (
    Arrival,
    Promise,
    merged,
    promised,
    rate,
    scaled,
    sliced,
    spread,
)


def row(at_s, **fields):
    return Arrival(at_s=at_s, **{"prompt_tokens": 10, "output_tokens": 2} | fields)


TALK = (
    row(0.0, session=0, blocks=(0, 1), block_tokens=4),
    row(1.0),
    row(3.0, session=0, turn=2, parent=0, gap_s=3.0, blocks=(0, 1, 2), block_tokens=4),
    row(4.0, session=1, blocks=(0,), block_tokens=4),
    row(9.0, session=0, turn=3, parent=2, gap_s=6.0),
)


class TestScaled:
    def test_doubles_the_speed(self):
        """Factor 2 halves every moment and every gap, and touches nothing else."""
        fast = scaled(TALK, factor=2.0)

        assert [a.at_s for a in fast] == [0.0, 0.5, 1.5, 2.0, 4.5]
        assert fast[2].gap_s == 1.5
        assert [a.blocks for a in fast] == [a.blocks for a in TALK]

    def test_kept_gaps_move_whole_sessions(self):
        """Sessions start sooner, their turns stay as far apart, and parents follow the sorting."""
        fast = scaled(TALK, factor=4.0, gaps="kept")

        assert [a.at_s for a in fast] == [0.0, 0.25, 1.0, 3.0, 9.0]
        assert [a.session for a in fast] == [0, None, 1, 0, 0]
        assert [a.parent for a in fast] == [None, None, None, 0, 3]

    @given(
        at_s=st.lists(st.integers(0, 10**9), min_size=2, max_size=50, unique=True),
        rate_per_s=st.floats(0.01, 1000),
    )
    def test_keeps_order_and_count(self, at_s, rate_per_s):
        """Every row is still there, still in order, and the mean rate is the one asked for."""
        before = tuple(row(at / 1e4) for at in sorted(at_s))

        after = scaled(before, rate_per_s=rate_per_s)

        assert len(after) == len(before)
        assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(after))
        assert rate(after) == pytest.approx(rate_per_s, rel=1e-3)

    def test_a_rate_needs_a_span(self):
        """Rows that come all at once have no rate to change."""
        with pytest.raises(ValueError, match="2 arrivals come all at once"):
            scaled([row(1.0), row(1.0)], rate_per_s=5.0)

    @pytest.mark.parametrize(
        "asked", [{}, {"factor": 1.0, "rate_per_s": 1.0}, {"factor": 0.0}, {"rate_per_s": -1.0}]
    )
    def test_wants_one_positive_number(self, asked):
        """Neither, both or a number that is not positive is an error that shows it."""
        with pytest.raises(ValueError, match="wanted"):
            scaled(TALK, **asked)


class TestSliced:
    def test_starts_at_zero_and_forgets_earlier_parents(self):
        """The window is moved to 0; a turn whose parent is outside stands without it."""
        piece = sliced(TALK, 1.0, 9.5)

        assert [a.at_s for a in piece] == [0.0, 2.0, 3.0, 8.0]
        assert [(a.parent, a.gap_s) for a in piece] == [(None, None)] * 3 + [(1, 6.0)]

    def test_refuses_an_empty_window(self):
        """The end comes after the start."""
        with pytest.raises(ValueError, match=r"slice is 5\.0 to 5\.0 s"):
            sliced(TALK, 5.0, 5.0)


def test_merged_keeps_sessions_and_blocks_apart():
    """Two copies at once share no session, no block and no parent."""
    both = merged(TALK, TALK)

    assert len(both) == 10
    assert len({a.session for a in both if a.session is not None}) == 4
    assert both[1].blocks == (3, 4)
    for a in both:
        if a.parent is not None:
            assert both[a.parent].session == a.session
            assert both[a.parent].turn == a.turn - 1


@pytest.mark.parametrize(
    ("rows", "grid_s", "message"),
    [(TALK, 3.0, "rows have parents"), (TALK[:2], 0.0, r"grid is 0\.0 s")],
)
def test_spread_refuses_what_it_would_break(rows, grid_s, message):
    """A turn might overtake its parent, and a tick has a length."""
    with pytest.raises(ValueError, match=message):
        spread(rows, grid_s, np.random.default_rng(1))


def test_promised_fills_every_row():
    """A promise lands on every row and changes no length."""
    rows = promised(TALK, Promise(ttft_s=0.5, tenant="editor", priority=2))

    assert {(a.ttft_s, a.tpot_s, a.tenant, a.priority) for a in rows} == {(0.5, None, "editor", 2)}
    assert [a.prompt_tokens for a in rows] == [a.prompt_tokens for a in TALK]


def test_summary_counts_what_a_cache_would_serve():
    """Prefix share: 8 + 4 of 50 tokens stood before at the same position."""
    found = summary(TALK)

    assert found.rows == 5
    assert found.duration_s == 9.0
    assert found.sessions == 2
    assert found.prefix_share == pytest.approx((8 + 4) / 50)
    assert found.prompt_tokens.p50 == 10
    assert found.arrival_cv == pytest.approx(0.7286, abs=0.0001)


@pytest.mark.parametrize("later", [(9, 1), (1, 0), (2, 0, 1)])
def test_a_block_counts_only_at_its_place_behind_its_whole_prefix(later):
    """A known block after an unknown one, or at another position, is no hit."""
    rows = [
        row(0.0, blocks=(0, 1), block_tokens=4, prompt_tokens=12),
        row(1.0, blocks=later, block_tokens=4, prompt_tokens=12),
    ]

    assert prefix_share(rows) == 0.0


def test_an_empty_workload_has_a_summary():
    """No rows is a fact, not a crash."""
    assert summary(()).rows == 0
    assert rate(()) == 0.0
