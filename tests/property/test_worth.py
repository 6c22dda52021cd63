"""The odds of promises per token, reckoned in few calls of numpy, against the same one by one and by hand."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduler.pace import Noise
from scheduler.spread import LOGISTIC

SECONDS = st.floats(1e-3, 10.0)
ROWS = st.integers(1, 9).flatmap(
    lambda n: st.tuples(*[st.lists(SECONDS, min_size=n, max_size=n) for _ in range(3)])
)


def odds_of(noise, promised_s, pace_s):
    """The chance of one promise on one endpoint, as it is written down in the docs."""
    z = (math.log(promised_s / pace_s) - noise.bias) / noise.sigma
    return 1.0 / (1.0 + math.exp(-LOGISTIC * min(20.0, max(-20.0, z))))


@given(rows=ROWS, bias=st.floats(-0.5, 0.5), sigma=st.floats(0.05, 1.0))
def test_two_promises_asked_at_once_have_the_odds_of_each(rows, bias, sigma):
    """Two rows of one array say what either says alone, to the last bit, and what a formula by hand says."""
    own_s, tightest_s, pace_s = map(np.array, rows)
    noise = Noise(bias=bias, sigma=sigma)

    together = noise.odds(np.array([own_s, tightest_s]), pace_s)

    assert together[0].tolist() == noise.odds(own_s, pace_s).tolist()
    assert together[1].tolist() == noise.odds(tightest_s, pace_s).tolist()
    by_hand = [odds_of(noise, *one) for one in zip(own_s, pace_s, strict=True)]
    assert np.allclose(together[0], by_hand, rtol=1e-9, atol=0.0)


@given(rows=ROWS)
def test_a_slower_place_takes_no_more_odds_than_there_are(rows):
    """Whatever comes on top, a promise loses at most the chance that it had, and never gains."""
    promised_s, pace_s, slower = map(np.array, rows)
    odds = Noise().odds(promised_s, pace_s)

    fall = Noise().fall(odds, slower)

    assert (fall >= 0).all()
    assert (fall <= odds).all()
