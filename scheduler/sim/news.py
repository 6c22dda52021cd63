"""What a worker has to say between two beats: who has started, who has had a first token."""

import math

from scheduler.sim.attempt import Attempt


class News:
    """Gathered for a moment after the first of them, so that what comes together is said together."""

    def __init__(self, gather_s: float) -> None:
        self._gather_s = gather_s
        self.at = math.inf
        "When it is to be said; `inf`: there is none."
        self._started: list[str] = []
        self._first_tokens: list[str] = []

    def start(self, attempt: Attempt, now: float) -> None:
        self._started.append(attempt.name)
        self._hurry(now)

    def first_token(self, attempt: Attempt, now: float) -> None:
        self._first_tokens.append(f"{attempt.name}:{(now - attempt.pulled_at) * 1e3:.1f}")
        self._hurry(now)

    def take(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who has started, and who has had a first token after how many milliseconds, since it was last asked."""
        taken = tuple(self._started), tuple(self._first_tokens)
        self._started, self._first_tokens, self.at = [], [], math.inf
        return taken

    def _hurry(self, now: float) -> None:
        self.at = min(self.at, now + self._gather_s)
