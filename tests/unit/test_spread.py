"""Quantiles cover what they say, also while errors drift and feedback comes late."""

import math

import numpy as np
import pytest

from scheduler import spread
from scheduler.forecast import PARTS
from scheduler.spread import Spread

LATE = 40
"Completions between a prediction and its feedback."

BEHIND_S = 1.0
"Predicted seconds before each: one bucket."


def covered(log_ratios, *, first: int = 500) -> list[float]:
    """What part of these each quantile covered, as said when the request was handed over; the first are practice."""
    made, said, found = Spread(), [], []
    for at, log_ratio in enumerate(log_ratios):
        said.append(made.ratios(BEHIND_S))
        found.append(tuple(log_ratio <= math.log(ratio) for ratio in said[at]))
        if at >= LATE:
            made.add(BEHIND_S, log_ratios[at - LATE], found[at - LATE])
    return np.mean(np.array(found[first:], dtype=float), axis=0).tolist()


DRIFTS = {
    "steady": np.zeros,
    "a queue that grows": lambda n: np.linspace(0, 2.0, n),
    "a queue that grows and empties": lambda n: np.abs(np.linspace(-1.5, 1.5, n)),
    "day and night": lambda n: 0.4 * np.sin(np.arange(n) / 300),
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_covers_nine_in_ten(drift, seed):
    """88 to 92 % within the 90 % quantile after 500 completions, and about half within the median."""
    rng = np.random.default_rng(seed)
    n = 4000
    log_ratios = (DRIFTS[drift](n) + rng.normal(0, 0.2, n)).tolist()

    half, nine = covered(log_ratios)

    assert PARTS == (0.5, 0.9)
    assert 0.88 <= nine <= 0.92
    assert 0.45 <= half <= 0.55


def test_without_corrections_a_growing_queue_is_missed(monkeypatch):
    """The test above is not true of a window of the past by itself."""
    monkeypatch.setattr(spread, "STEP", 0.0)
    rng = np.random.default_rng(0)
    log_ratios = (DRIFTS["a queue that grows"](4000) + rng.normal(0, 0.2, 4000)).tolist()

    assert covered(log_ratios)[1] < 0.85


def test_a_median_is_never_above_the_bound():
    """Corrections move apart from each other; what is said stays in order."""
    made = Spread()
    for at in range(200):
        made.add(BEHIND_S, 0.0, (False, True))
        half, nine = made.ratios(BEHIND_S)
        assert half <= nine, at


def test_one_band_says_nothing_of_another():
    """Who waited long is not judged by those who found nobody before them."""
    made = Spread()
    before = made.ratios(0.0)
    for _ in range(100):
        made.add(BEHIND_S, 1.0, (False, False))

    assert made.ratios(0.0) == before
    assert [spread.band(s) for s in (0.0, 0.1, BEHIND_S)] == list(spread.BANDS)


def test_before_anything_was_seen_odds_and_quantiles_are_of_one_curve():
    """Whatever is said to take no longer in nine of ten cases has those odds."""
    made = Spread()

    for part, ratio in zip(PARTS, made.ratios(0.0), strict=True):
        assert made.odds(0.0, math.log(ratio)) == pytest.approx(part)
