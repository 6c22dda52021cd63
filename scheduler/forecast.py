"""A prediction as it rides in a job and comes back in the reward, beside what the request really took.

It comes back in the reward, so that every prediction is judged by what was known when it was made, however late the
answer to it comes: the features it was made from, the wait that stood before it, and two quantiles.
"""

from collections.abc import Sequence

import msgspec

from scheduler import cost
from scheduler.wire.worker import Reward

PARTS = (0.5, 0.9)
"The quantiles that are said: half, and nine in ten, take no longer."

SECONDS_MAX = 3600.0
"No first token takes an hour: what says so is no measurement."

SECONDS_MIN = 1e-3
"No prediction is shorter."

_PREFIXES = tuple(f"{name}=" for name in (*cost.FEATURES, "start", "q50", "q90"))
_FORM = " ".join(f"{prefix}%.6g" for prefix in _PREFIXES)


class Forecast(msgspec.Struct, frozen=True):
    """One prediction and what it came to."""

    x: tuple[float, ...]
    "The features, in the order of `cost.FEATURES`."

    start_s: float
    "The predicted wait, which says how uncertain the prediction was."

    ratios: tuple[float, ...]
    "For each of `PARTS` the times of the predicted seconds that this part of such requests takes at most."

    predicted_s: float | None
    "To the first token; None: the reward does not say."

    seconds: float
    "What it took, by the worker's clock."

    @property
    def covered(self) -> tuple[bool, ...]:
        """Whether it took no longer than each quantile said; empty where nothing was predicted."""
        predicted_s = self.predicted_s
        if predicted_s is None:
            return ()
        return tuple([self.seconds <= ratio * predicted_s for ratio in self.ratios])


def written(x: Sequence[float], start_s: float, ratios: Sequence[float]) -> tuple[str, ...]:
    """As it rides in the job and the decision, and comes back in the reward."""
    return tuple((_FORM % (*x, start_s, *ratios)).split(" "))


def read(reward: Reward) -> Forecast | None:
    """What a reward says of both; None where either is no sane measurement."""
    return held(reward.features, reward.predicted_s, _measured_s(reward))


def held(
    features: Sequence[str], predicted_s: float | None, seconds: float | None
) -> Forecast | None:
    """What was said against what came of it; None where either is no sane measurement."""
    row = _parsed(features)
    if row is None or seconds is None or not 1e-4 <= seconds <= SECONDS_MAX:
        return None
    *x, start_s, q50, q90 = row
    if predicted_s is not None and not SECONDS_MIN <= predicted_s <= SECONDS_MAX:
        predicted_s = None
    return Forecast(tuple(x), start_s, (q50, q90), predicted_s, seconds)


def ratios(features: Sequence[str]) -> tuple[float, ...]:
    """The two quantiles alone, for people; empty where the features do not say them."""
    row = _parsed(features)
    return () if row is None else tuple(row[-len(PARTS) :])


def _measured_s(reward: Reward) -> float | None:
    """Seconds to first token as the worker's own clock saw them; None where it did not.

    From the pull where it is known, so that what the worker held back before admission counts as the queue that
    the features at decision time had already seen; else from admission.
    """
    if reward.pulled_at is not None and reward.first_token_at is not None:
        return reward.first_token_at - reward.pulled_at
    return reward.prefill_s


def _parsed(features: Sequence[str]) -> list[float] | None:
    """All as a row; None unless all are there as they were sent, each a sane number."""
    named = zip(features, _PREFIXES, strict=True)
    try:
        row = [float(feature.removeprefix(prefix)) for feature, prefix in named]
    except ValueError:  # one is missing, or still has another's name
        return None
    return row if all(0 <= value <= SECONDS_MAX for value in row) else None  # nan fails it too
