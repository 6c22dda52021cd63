"""What was learned, as plain numbers: all that a new leader takes over, and how it is told from nonsense."""

import math

import msgspec

from scheduler import cost, pace, transfer
from scheduler.regression import Sums
from scheduler.speed import LOG_MAX

VERSION = 2

REMEMBERED_MAX = 1000
"Endpoints that are kept, with those that left and may come back."


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint, by its name."""

    declared: str = ""
    "Its hardware when all this was learned: under the same name another one starts cold."

    log: float = 0.0
    "Log of the times its declared time that a prefill takes."

    count: float = 0.0
    "Completions that taught it."

    error: float = 0.0
    coverage: float = 0.0

    link: tuple[float, float] = (0.0, 0.0)
    "Log speed of its link for KV, and from how many transfers."

    pace: tuple[float, float] = (0.0, 0.0)
    "Log speed of its decoding, and from how many answers."

    is_distrusted: bool = False
    "Whether the guard went by the prior there."

    def is_sound(self) -> bool:
        """Whether these are speeds and counts."""
        logs = self.log, self.link[0], self.pace[0]
        counts = self.count, self.link[1], self.pace[1]
        figures = *logs, *counts, self.error, self.coverage
        if not all(map(math.isfinite, figures)):
            return False
        return max(map(abs, logs)) <= LOG_MAX and min(counts) >= 0


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """The learned part of a snapshot."""

    version: int = VERSION
    "Of this layout; another one is a cold start."

    prefill: Sums = Sums()
    "What the whole fleet has taught of prefill,"

    transfer: Sums = Sums()
    "of handing KV over,"

    pace: Sums = Sums()
    "and of decoding."

    endpoints: dict[str, Life] = {}

    windows: dict[str, tuple[float, ...]] = {}
    "Recent values of every running quantile, oldest first."

    models: tuple[str, ...] = ()
    "Every model ever served here."

    def is_sound(self) -> bool:
        """Whether these numbers are of this layout, finite, and of sums that can be solved."""
        return (
            self.version == VERSION
            and self.prefill.is_sound(len(cost.FEATURES))
            and self.transfer.is_sound(len(transfer.FEATURES))
            and self.pace.is_sound(pace.TERMS)
            and len(self.endpoints) <= 2 * REMEMBERED_MAX
            and all(life.is_sound() for life in self.endpoints.values())
            and all(math.isfinite(n) for numbers in self.windows.values() for n in numbers)
        )
