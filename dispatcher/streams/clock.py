"""Redis' clock, read without asking it: the one clock that stamps the entries and that all nodes share."""

import time
from collections.abc import Sequence
from typing import NamedTuple

READINGS = 5
"Of each measuring, the quickest counts: a reply that waited for a busy core would be off by half its wait, 20 ms under load."

EVERY_S = 10.0
"How often the offset is measured anew; quartz drifts by less than 1 ms in that time."


class Reading(NamedTuple):
    """What the server said, and when we asked and heard it on our monotonic clock."""

    server: float
    asked_at: float
    heard_at: float

    @property
    def took_s(self) -> float:
        """There and back."""
        return self.heard_at - self.asked_at


class Clock:
    """Unix seconds on the server's clock, that never go back.

    Kept over our own monotonic clock, so that setting this machine's time moves nothing.
    """

    def __init__(self) -> None:
        """Unset; `set` before the first reading."""
        self._offset_s = time.time() - time.monotonic()
        self._set_at = float("-inf")
        self._last = float("-inf")

    @property
    def is_stale(self) -> bool:
        """Whether it should be set anew."""
        return time.monotonic() - self._set_at > EVERY_S

    def set(self, readings: Sequence[Reading]) -> None:
        """Take the server's time from the quickest of these."""
        best = min(readings, key=lambda one: one.took_s)
        # The server looked at its clock halfway, give or take half the round trip.
        self._offset_s = best.server - (best.asked_at + best.heard_at) / 2
        self._set_at = best.heard_at

    def now(self) -> float:
        """Unix seconds."""
        self._last = max(self._last, time.monotonic() + self._offset_s)
        return self._last
