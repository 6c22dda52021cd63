"""Redis' clock, read without asking it: the one clock that stamps the entries and that all nodes share."""

import time

EVERY_S = 10.0
"How often the offset is measured anew; quartz drifts by less than 1 ms in that time."


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

    def set(self, server: float, *, asked_at: float) -> None:
        """Take the server's answer; it was asked at `asked_at` on our monotonic clock."""
        answered_at = time.monotonic()
        # The server looked at its clock halfway, give or take half the round trip.
        self._offset_s = server - (asked_at + answered_at) / 2
        self._set_at = answered_at

    def now(self) -> float:
        """Unix seconds."""
        self._last = max(self._last, time.monotonic() + self._offset_s)
        return self._last
