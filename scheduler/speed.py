"""How endpoints differ from what they declare: times longer, learned from one log error after the other.

`Speed` is one endpoint's at computing prompts, which a drift makes learn fast again. `Speeds` are all endpoints' at
something else, by slot: decoding (`pace`), and handing KV over (`transfer`).
"""

import msgspec
import numpy as np

from scheduler.cost import UNKNOWN, Hardware
from scheduler.regression import Drift

GAIN, FAST_GAIN, FAST_TURNS = 0.03, 0.3, 15
"How much of a log error an endpoint's speed takes over: always, and for this many completions after a drift."

YOUNG = 10
"Completions up to which an endpoint is little known."

STEP = 0.7
"The largest log error believed at once, a factor of two."

LOG_MAX = 3.0
"A server is at most 20 times faster or slower than declared."

STEADY_GAIN = 0.05
"How much of a log error `Speeds` take over, once an endpoint is no longer young."

RECALLED_MAX = 15
"Lessons that an earlier life counts for in `Speeds`: a new one may differ."


class Speed(msgspec.Struct, kw_only=True):
    """How one endpoint differs from what it declares."""

    name: str
    declared: str
    hardware: Hardware
    log: float = 0.0
    "Log of the times longer it takes."
    count: int = 0
    "Completions learned from."
    error: float = 0.0
    "Moving mean of |log(actual / predicted)|."
    coverage: float = 0.0
    "Moving share of those within the 90 % bound."
    fast: int = 0
    "Completions for which it still learns fast."
    drift: Drift = msgspec.field(default_factory=Drift)

    @property
    def is_young(self) -> bool:
        """Whether so little is known, nothing declared and hardly anything measured, that no lesson should wait."""
        return self.hardware is UNKNOWN and self.count < YOUNG

    def recall(self, log: float, count: float, error: float, coverage: float) -> None:
        """Go on from an earlier life; a new one may differ, so it learns a little faster."""
        self.log, self.error, self.coverage = log, error, coverage
        self.count = min(int(count), FAST_TURNS)

    def learn(self, log_error: float) -> None:
        """Take over a part of one log error; more of it while young, and after a drift."""
        if self.drift.is_seen(log_error):
            self.fast = FAST_TURNS
        gain = max(GAIN, 1 / (self.count + 3), FAST_GAIN if self.fast else 0.0)
        self.fast = max(0, self.fast - 1)
        self.count += 1
        moved = self.log + gain * max(-STEP, min(STEP, log_error))
        self.log = max(-LOG_MAX, min(LOG_MAX, moved))

    def judge(self, log_ratio: float, *, is_covered: bool) -> None:
        """Keep account of how good its predictions were."""
        gain = max(0.05, 1 / (self.count + 1))
        self.error += gain * (abs(log_ratio) - self.error)
        self.coverage += gain * (float(is_covered) - self.coverage)


class Speeds:
    """The logs of the times longer that each endpoint takes, by slot, and from how many lessons they are known."""

    def __init__(self) -> None:
        """No endpoint yet."""
        self.log = np.zeros(0)
        "float64[n_slots]."
        self.counts: list[int] = []

    def open(self, slot: int) -> None:
        """An endpoint takes this slot: as declared."""
        if slot == len(self.log):
            self.log = np.append(self.log, 0.0)
            self.counts.append(0)
        self.log[slot] = self.counts[slot] = 0

    def numbers(self, slot: int) -> tuple[float, float]:
        """What is remembered of this endpoint: its log, and from how many lessons."""
        return float(self.log[slot]), float(self.counts[slot])

    def recall(self, slot: int, log: float, count: float) -> None:
        """Go on from an earlier life."""
        self.log[slot], self.counts[slot] = log, min(int(count), RECALLED_MAX)

    def learn(self, slot: int, log_error: float) -> None:
        """Take over a part of one log error; more of it while young."""
        self.counts[slot] += 1
        gain = max(STEADY_GAIN, 1 / (self.counts[slot] + 3))
        moved = self.log.item(slot) + gain * max(-STEP, min(STEP, log_error))
        self.log[slot] = max(-LOG_MAX, min(LOG_MAX, moved))
