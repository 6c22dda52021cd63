"""How far predictions are off: running quantiles of log(actual / predicted), by what stood before the request."""

import math
from bisect import bisect_left

from scheduler.window import Window

BUCKETS_S = (1e-3, 0.2)
"Predictions are as uncertain as what stands before them: nothing, a little, more."

SIZE, LEAST = 300, 30
"Completions a bucket remembers, and how many make its quantiles worth believing."

COLD_SIGMA = 0.3
"Until then: the log error of a data sheet's prediction, roughly a normal one."

LOGISTIC = 1.702
"The logistic curve so much steeper is within 0.01 of the normal distribution."


class Spread:
    """Three windows of log ratios."""

    def __init__(self) -> None:
        """Nothing seen: a normal guess."""
        self._windows = [Window(SIZE) for _ in range(len(BUCKETS_S) + 1)]

    def add(self, start_s: float, log_ratio: float) -> None:
        """One completion that had stood behind this many predicted seconds."""
        self._windows[_bucket(start_s)].add(log_ratio)

    def log_ratio(self, start_s: float, part: float) -> float:
        """The quantile of log(actual / predicted), from what was seen, else a normal guess."""
        return self._quantile(self._windows[_bucket(start_s)], part)

    def odds(self, start_s: float, log_ratio: float) -> float:
        """The part of completions behind so many predicted seconds whose log(actual / predicted) is no more."""
        seen = self._windows[_bucket(start_s)]
        if len(seen) >= LEAST:
            return seen.share(log_ratio)
        steepness = LOGISTIC / COLD_SIGMA
        return 1.0 / (1.0 + math.exp(-min(20.0, max(-20.0, steepness * log_ratio))))

    def export(self) -> dict[str, tuple[float, ...]]:
        """Every window by name, oldest value first."""
        return {f"spread:{i}": tuple(window) for i, window in enumerate(self._windows)}

    def restore(self, windows: dict[str, tuple[float, ...]]) -> None:
        """Take over windows by name."""
        for i in range(len(self._windows)):
            if f"spread:{i}" in windows:
                self._windows[i] = Window(SIZE, windows[f"spread:{i}"])

    def _quantile(self, seen: Window, part: float) -> float:
        if len(seen) >= LEAST:
            return seen.quantile(part)
        # The logistic curve's quantile: within 4 % of the normal one from 2 % to 98 %.
        return COLD_SIGMA * math.log(part / (1.0 - part)) / LOGISTIC if part < 1 else math.inf


def _bucket(start_s: float) -> int:
    return bisect_left(BUCKETS_S, start_s)
