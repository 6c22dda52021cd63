"""What was said of a request rides in its job and is held against what it took."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import cost, forecast
from scheduler.wire.worker import Reward

N = len(cost.FEATURES)
SAID = forecast.written([0.125] * N, 0.25, (1.0, 2.0))
SECONDS = st.floats(1e-3, 1000)


def reward(**fields: object) -> Reward:
    said = {"features": SAID, "predicted_s": 0.5, "prefill_s": 0.75, **fields}
    return Reward(id="r", endpoint="e", epoch=1, attempt=1, outcome="completed", **said)


@given(
    x=st.lists(SECONDS, min_size=N, max_size=N),
    rest=st.tuples(SECONDS, SECONDS, SECONDS),
    predicted_s=SECONDS,
    seconds=SECONDS,
)
def test_what_is_written_is_read(x, rest, predicted_s, seconds):
    """To six digits, and what took no longer than a quantile said is covered by it."""
    start_s, *ratios = rest
    features = forecast.written(x, start_s, ratios)

    seen = forecast.held(features, predicted_s, seconds)

    assert seen.x == pytest.approx(tuple(x), rel=1e-5)
    assert seen.start_s == pytest.approx(start_s, rel=1e-5)
    assert seen.ratios == forecast.ratios(features) == pytest.approx(tuple(ratios), rel=1e-5)
    assert seen.covered == tuple(seconds <= ratio * predicted_s for ratio in seen.ratios)


def test_seconds_count_from_the_pull_where_it_is_known():
    """What a worker held back is the queue that the features had seen; else from its admission."""
    assert forecast.read(reward()).seconds == 0.75
    assert forecast.read(reward(pulled_at=7.0)).seconds == 0.75
    assert forecast.read(reward(pulled_at=7.0, first_token_at=9.0)).seconds == 2.0


@pytest.mark.parametrize(
    "nonsense",
    [
        {"features": ()},
        {"features": SAID[1:]},
        {"features": (*SAID[:-1], "q90=x")},
        {"features": (*SAID[:-1], "q90=-1")},
        {"features": (*SAID[:-1], "q90=nan")},
        {"prefill_s": None},
        {"prefill_s": 0.0},
        {"prefill_s": 1e6},
        {"prefill_s": math.nan},
        {"pulled_at": 9.0, "first_token_at": 7.0},
    ],
    ids=lambda said: str(said)[-40:],
)
def test_what_is_no_measurement_is_held_against_nothing(nonsense):
    """Whatever is missing, or could not be."""
    assert forecast.read(reward(**nonsense)) is None


@pytest.mark.parametrize("predicted_s", [None, 0.0, -1.0, 1e9, math.nan])
def test_what_nobody_predicted_is_learned_from_all_the_same(predicted_s):
    """No quantile is judged by it."""
    seen = forecast.read(reward(predicted_s=predicted_s))

    assert (seen.seconds, seen.predicted_s, seen.covered) == (0.75, None, ())


def test_features_without_quantiles_say_none():
    """As an explanation reads them."""
    assert forecast.ratios(SAID[:-1]) == ()
