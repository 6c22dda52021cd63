"""How far predictions are off: running quantiles of log(actual / predicted), by what stood before the request."""

import math
from bisect import bisect_left

import numpy as np

from scheduler.state import Floats
from scheduler.window import Window

BUCKETS_S = (1e-3, 0.2)
"Predictions are as uncertain as what stands before them: nothing, a little, more."

_EDGES_S = np.array(BUCKETS_S)

SIZE, LEAST = 300, 30
"Completions a bucket remembers, and how many make its quantiles worth believing."

COLD_SIGMA = 0.3
"Until then: the log error of a data sheet's prediction, roughly a normal one."


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

    def factor(self, start_s: Floats, part: float) -> Floats:
        """By what factor this part of the completions beat its prediction; 1 where `part` is 0."""
        if part <= 0:
            return np.ones(len(start_s))
        factors = np.exp([self._quantile(window, part) for window in self._windows])
        chosen: Floats = factors[_EDGES_S.searchsorted(start_s)]
        return chosen

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
        return COLD_SIGMA * math.log(part / (1.0 - part)) / 1.702 if part < 1 else math.inf


def _bucket(start_s: float) -> int:
    return bisect_left(BUCKETS_S, start_s)
