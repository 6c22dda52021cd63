"""Draws with exact chances: what is logged as a propensity is how often it happens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import explore


class TestChances:
    def test_equals_have_equal_chances_and_the_closed_have_none(self):
        """Who may not go is never drawn."""
        found = explore.chances(np.array([0.3, 0.3, np.inf, 0.3]), scale=0.05)

        assert found == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])

    @given(seconds=st.lists(st.floats(0.01, 1), min_size=1, max_size=40), scale=st.floats(0.1, 2))
    def test_whoever_may_be_drawn_is_drawn_often_enough_to_learn_from(self, seconds, scale):
        """No estimate is divided by less than one in two hundred; the nearest can always be drawn."""
        found = explore.chances(np.array(seconds), scale=scale)

        assert found.sum() == pytest.approx(1.0)
        assert found[found > 0].min() >= explore.CHANCE_MIN
        assert found[np.argmin(seconds)] == found.max()

    def test_they_are_how_often_the_smallest_draw_is_whose(self):
        """Log seconds plus Gumbel draws of this scale: the share of wins is the closed form."""
        seconds, scale = np.array([0.30, 0.31, 0.40]), 0.1
        rng = np.random.default_rng(0)
        drawn = np.log(seconds) - scale * rng.gumbel(size=(200_000, 3))

        wins = np.bincount(drawn.argmin(axis=1), minlength=3) / len(drawn)

        assert explore.chances(seconds, scale=scale) == pytest.approx(wins, abs=0.01)

    def test_one_that_is_clearly_slower_is_never_drawn(self):
        """No propensity near 0 may rule an estimate."""
        assert explore.chances(np.array([0.3, 0.9]), scale=0.05).tolist() == [1.0, 0.0]


class TestPaid:
    SECONDS = np.array([0.2, 0.5, 3.0])
    SURE = np.array([1.0, 0.0, 0.0])
    OPEN = np.array([True, True, True])

    def test_slack_pays_for_those_that_still_make_it(self):
        """A share goes to any endpoint that is in time twice over."""
        found = explore.paid(self.SURE, self.SECONDS, self.OPEN, left_s=2.0, share=0.1)

        assert found == pytest.approx([0.95, 0.05, 0.0])

    @pytest.mark.parametrize("left_s", [0.3, np.inf])
    def test_without_slack_or_promise_nobody_pays(self, left_s):
        """One endpoint in time is no choice, and no promise is no slack."""
        found = explore.paid(self.SURE, self.SECONDS, self.OPEN, left_s=left_s, share=0.1)

        assert found.tolist() == self.SURE.tolist()


def test_draws_fall_as_the_chances_say():
    """Evenly spread numbers land on each candidate in proportion; the impossible is never hit."""
    chances = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    uniform = (np.arange(1000) + 0.5) / 1000

    hits = [explore.drawn(chances, float(one)) for one in (*uniform, 0.0, np.nextafter(1.0, 0.0))]

    assert np.bincount(hits, minlength=5).tolist() == [0, 251, 0, 751, 0]
