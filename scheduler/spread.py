"""How far predictions are off: running quantiles of log(actual / predicted), by what stood before the request.

A window of the past says what its quantiles were, and in a queue that grows it is always late: feedback comes when
the first token does. So each quantile that is told carries a correction that is moved after every completion, up by
what was missed and down by what was covered, in proportions that leave it alone when the right share was covered:
a gradient step on the pinball loss (Gibbs and Candes 2021 track a quantile so under any drift).
"""

import math
from bisect import bisect_left

from scheduler.forecast import PARTS
from scheduler.window import Window

BUCKETS_S = (1e-3, 0.2)
"Predictions are as uncertain as what stands before them: nothing, a little, more."

BANDS = ("none", "short", "long")
"Their names."

SIZE, LEAST = 300, 30
"Completions a bucket remembers, and how many make its quantiles worth believing."

STEP, CORRECTION_MAX = 0.02, 1.0
"Of a correction, in logs: what one completion moves it, and the most it may become."

COLD_SIGMA = 0.3
"Until then: the log error of a data sheet's prediction, roughly a normal one."

LOGISTIC = 1.702
"The logistic curve so much steeper is within 0.01 of the normal distribution."


class Spread:
    """Three windows of log ratios, and a correction for each quantile told of each."""

    def __init__(self) -> None:
        """Nothing seen: a normal guess."""
        self._windows = [Window(SIZE) for _ in BANDS]
        self._corrections = [[0.0 for _ in PARTS] for _ in BANDS]
        self._told: list[tuple[float, ...] | None] = [None for _ in BANDS]
        "Ratios as last told; None: something was learned since."

    def add(self, start_s: float, log_ratio: float, covered: tuple[bool, ...]) -> None:
        """One completion that had stood behind this many predicted seconds, and which quantiles had covered it."""
        at = _bucket(start_s)
        self._told[at] = None
        self._windows[at].add(log_ratio)
        if len(self._windows[at]) <= LEAST:
            return  # it was the guess that was right or wrong
        own = self._corrections[at]
        for i, (part, is_covered) in enumerate(zip(PARTS, covered, strict=False)):
            moved = own[i] + STEP * (part - float(is_covered))
            own[i] = max(-CORRECTION_MAX, min(CORRECTION_MAX, moved))

    def ratios(self, start_s: float) -> tuple[float, ...]:
        """For each of `PARTS` the actual over the predicted seconds that this part of such requests does not exceed."""
        return self._tell(_bucket(start_s))

    def refresh(self) -> None:
        """Make them out, as the next who asks would."""
        for at in range(len(BANDS)):
            self._tell(at)

    def odds(self, start_s: float, log_ratio: float) -> float:
        """The part of completions behind so many predicted seconds whose log(actual / predicted) is no more."""
        seen = self._windows[_bucket(start_s)]
        if len(seen) >= LEAST:
            return seen.share(log_ratio)
        steepness = LOGISTIC / COLD_SIGMA
        return 1.0 / (1.0 + math.exp(-min(20.0, max(-20.0, steepness * log_ratio))))

    def export(self) -> dict[str, tuple[float, ...]]:
        """Every window by name, oldest value first, and the corrections."""
        found = {f"spread:{i}": tuple(window) for i, window in enumerate(self._windows)}
        return found | {f"correction:{i}": tuple(own) for i, own in enumerate(self._corrections)}

    def restore(self, windows: dict[str, tuple[float, ...]]) -> None:
        """Take over windows and corrections by name."""
        for i in range(len(BANDS)):
            self._told[i] = None
            self._windows[i] = Window(SIZE, windows.get(f"spread:{i}", ()))
            own = windows.get(f"correction:{i}", ())
            if len(own) == len(PARTS) and all(abs(one) <= CORRECTION_MAX for one in own):
                self._corrections[i] = list(own)

    def _tell(self, at: int) -> tuple[float, ...]:
        told = self._told[at]
        if told is None:
            told = self._told[at] = self._ratios(at)
        return told

    def _ratios(self, at: int) -> tuple[float, ...]:
        least, found = -math.inf, []
        for part, correction in zip(PARTS, self._corrections[at], strict=True):
            least = max(least, self._quantile(self._windows[at], part) + correction)
            found.append(math.exp(least))
        return tuple(found)

    def _quantile(self, seen: Window, part: float) -> float:
        if len(seen) >= LEAST:
            return seen.quantile(part)
        # The logistic curve's quantile: within 4 % of the normal one from 2 % to 98 %.
        return COLD_SIGMA * math.log(part / (1.0 - part)) / LOGISTIC


def band(start_s: float) -> str:
    """What stood before the request, as a word."""
    return BANDS[_bucket(start_s)]


def _bucket(start_s: float) -> int:
    return bisect_left(BUCKETS_S, start_s)
