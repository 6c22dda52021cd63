"""Learning what a request costs, one completion at a time."""

import math

import numpy as np
import pytest
from river import linear_model

from scheduler import cost
from scheduler.guard import Guard
from scheduler.predict import Predictor
from scheduler.regression import DecayedRegression
from scheduler.speed import Speed
from scheduler.wire.worker import Beat, Reward


def predictor(*hardware: str) -> Predictor:
    made = Predictor()
    for slot, name in enumerate(hardware or ("a100",)):
        made.open(slot, Beat(endpoint=f"e{slot}", epoch=1, hardware=name))
    return made


def serve(
    made: Predictor, slot: int, true_s, count: int, *, seed: int = 0, noise: float = 0.07
) -> list[float]:
    """Learn `count` completions whose true seconds are a function of the tokens; the |log errors| on the way."""
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(count):
        tokens = float(rng.lognormal(7.5, 0.8))
        features = made.features(
            slot,
            tokens=tokens,
            pairs=tokens**2 / 2,
            decode_kv=float(rng.integers(100_000)),
            start_s=0.0,
        )
        row = np.array([float(f.split("=")[1]) for f in features[:5]])
        predicted_s = made._bounded(made.speed(slot), row)
        seconds = true_s(tokens) * float(rng.lognormal(0, noise))
        errors.append(abs(math.log(seconds / predicted_s)))
        made.learn(reward(features, seconds, predicted_s=predicted_s, endpoint=f"e{slot}"), slot)
    return errors


def reward(features, seconds, **fields) -> Reward:
    return Reward(
        **{
            "id": "r",
            "endpoint": "e0",
            "epoch": 1,
            "attempt": 1,
            "outcome": "completed",
            "prefill_s": seconds,
            "features": features,
            **fields,
        }
    )


def test_a_wrong_data_sheet_is_mended_within_a_hundred_completions():
    """Three times slower than declared: the error falls to near the noise."""
    errors = serve(predictor(), 0, lambda n: 0.03 + n / 5_000, 200)

    assert errors[0] > 0.8
    assert np.mean(errors[100:]) < 0.12


def test_rates_follow_what_decodes_and_every_lesson():
    """They are made once for as long as neither changes, though the KV that decodes is counted in place."""
    made, decode_kv = predictor("a100", "h100"), np.zeros(2)
    idle = made.rates(decode_kv)
    assert made.rates(decode_kv) is idle

    decode_kv[1] = 100_000.0
    busy = made.rates(decode_kv)
    assert busy.token_s[1] > idle.token_s[1]

    serve(made, 1, lambda n: n / 1_000, 1)
    assert made.rates(decode_kv).token_s[1] > busy.token_s[1]


def test_each_endpoint_keeps_its_own_speed():
    """Two alike by declaration, one half as fast: the plan's rates tell them apart."""
    made = predictor("a100", "a100")
    for turn in range(40):
        serve(made, 0, lambda n: 0.012 + n / 16_000, 2, seed=turn)
        serve(made, 1, lambda n: 0.024 + n / 8_000, 2, seed=turn)

    token_s = made.rates(np.zeros(2)).token_s
    assert 1.6 < token_s[1] / token_s[0] < 2.4


def test_a_sudden_slowdown_is_followed_fast():
    """Page-Hinkley: ten completions after a server has slowed threefold, half of the error is gone."""
    made = predictor("a100", "a100", "a100")
    for turn in range(30):
        for slot in range(3):
            serve(made, slot, lambda n: 0.012 + n / 16_000, 2, seed=turn)

    errors = serve(made, 0, lambda n: 3 * (0.012 + n / 16_000), 40)

    assert np.mean(errors[15:]) < 0.5 * np.mean(errors[:3])


def test_one_surprise_moves_a_well_known_speed_little_and_a_drift_much():
    """After a threefold slow-down, half of it is believed within a dozen completions; of one alone, a thirtieth."""
    made = Speed(name="e", declared="a100", hardware=cost.CLASSES["a100"])
    for _ in range(200):
        made.learn(-made.log)
    made.learn(0.6)
    assert 0 < made.log < 0.03

    for _ in range(12):
        made.learn(math.log(3) - made.log)

    assert made.log > 0.5 * math.log(3)


def test_predictions_and_rates_say_the_same():
    """The plan adds up rates; the predictor multiplies features: one and the same number."""
    made = predictor("h100", "l4")
    serve(made, 1, lambda n: 0.05 + n / 3_000, 60)
    decode_kv = np.array([5e4, 2e5])
    rates = made.rates(decode_kv)
    rows = [
        [
            float(f.split("=")[1])
            for f in made.features(
                k, tokens=3000.0, pairs=4e6, decode_kv=decode_kv[k], start_s=0.0
            )[:5]
        ]
        for k in range(2)
    ]

    summed = rates.overhead_s + 3000.0 * rates.token_s + 4e6 * rates.pair_s
    whole = [made._bounded(made.speed(k), row) for k, row in enumerate(rows)]
    assert whole == pytest.approx(summed, rel=1e-4)


def test_the_bound_covers_what_it_says():
    """Nine in ten completions take no longer than the 90 % bound."""
    made = predictor()
    serve(made, 0, lambda n: 0.012 + n / 16_000, 100, noise=0.2)
    serve(made, 0, lambda n: 0.012 + n / 16_000, 200, noise=0.2, seed=1)

    assert 0.75 <= made.coverage(0) <= 1.0
    assert made.odds(0.0, 0.2 * 1.28) == pytest.approx(0.9, abs=0.07)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"features": ()}, id="no features"),
        pytest.param({"features": ("overhead=1",)}, id="some missing"),
        pytest.param({"features": ("tokens=nan",) * 8}, id="not a number"),
        pytest.param({"features": ("tokens=x", "=", "")}, id="no numbers at all"),
        pytest.param({"prefill_s": None}, id="nothing measured"),
        pytest.param({"prefill_s": -1.0}, id="negative"),
        pytest.param({"prefill_s": float("inf")}, id="infinite"),
        pytest.param({"prefill_s": 1e9}, id="absurd"),
    ],
)
def test_what_is_no_measurement_teaches_nothing(broken):
    """Rewards come from Redis: one bad number must not poison the weights for ever."""
    made = predictor()
    good = made.features(0, tokens=100.0, pairs=5e3, decode_kv=0.0, start_s=0.0)
    before = made.export(())

    made.learn(reward(**{"features": good, "seconds": 0.1, **broken}), 0)

    assert made.export(()) == before


def test_a_feature_that_never_fires_does_no_harm():
    """River's own smoothing forgets its prior and ends in NaN (after 6,700 completions); this keeps it."""
    made = DecayedRegression(np.ones(5), decay=0.9)
    x = np.array([0.01, 0.1, 0.1, 0.0, 0.0])
    for _ in range(2_000):
        made.learn_row(x, 0.3, 100.0)

    assert np.isfinite(made.weights).all()
    assert made.weights[3:] == pytest.approx((1.0, 1.0))
    assert float(x @ made.weights) == pytest.approx(0.3, rel=0.01)


def test_weights_are_never_negative():
    """A plan must not believe that more work takes less time."""
    made = DecayedRegression(np.ones(2))
    for _ in range(50):
        made.learn_row(np.array([1.0, 1.0]), 0.5, 1.0)
        made.learn_row(np.array([1.0, 2.0]), 0.2, 1.0)

    assert min(made.weights) >= 0


def test_a_snapshot_of_numbers_gives_the_same_predictions():
    """Warm start: weights, speeds and windows come back; never a pickle."""
    taught = predictor()
    serve(taught, 0, lambda n: 0.1 + n / 4_000, 60)
    fresh = Predictor()

    assert fresh.restore(taught.export(("m",)))
    fresh.open(0, Beat(endpoint="e0", epoch=2, hardware="a100"))

    assert fresh.rates(np.zeros(1)).token_s == pytest.approx(taught.rates(np.zeros(1)).token_s)
    assert fresh.odds(0.0, 0.1) == taught.odds(0.0, 0.1)


def test_other_hardware_under_the_same_name_starts_cold():
    """A speed is a server's own; its name may move to another one."""
    taught = predictor("a100")
    serve(taught, 0, lambda n: n / 2_000, 60)
    taught.close(0)
    taught.open(0, Beat(endpoint="e0", epoch=2, hardware="h100"))

    assert taught.speed(0) == 1.0


def test_we_still_stand_on_rivers_regression():
    """The base class is River's, and the detector's interface is as we use it."""
    assert issubclass(DecayedRegression, linear_model.BayesianLinearRegression)


class TestGuard:
    def guard(self) -> Guard:
        made = Guard()
        made.open(0)
        return made

    def test_noise_that_hits_both_alike_never_trips_it(self):
        """However long: neither prediction was the better one."""
        made = self.guard()
        for error in np.random.default_rng(0).normal(0.0, 0.5, 5000).tolist():
            made.judge(0, learned=error, prior=error)

        assert not made.is_on
        assert made.switches == [0]

    def test_one_bad_surprise_is_forgiven_and_two_are_not(self):
        """A prediction ten times off, beside one that was right."""
        made = self.guard()
        made.judge(0, learned=math.log(10), prior=0.0)
        assert not made.is_on
        made.judge(0, learned=math.log(10), prior=0.0)
        assert (made.distrusted.tolist(), made.switches) == ([True], [1])
