"""How long is waited: for a request's deadline, for an engine's next word, for an engine that says nothing at all.

Nothing is looked at while it cannot have happened: the earliest moment at which it could is kept, and only ever too
early, since every token moves its own later.
"""

from collections.abc import Callable, Collection, Iterator
from time import perf_counter

from scheduler.settings import WorkerSettings
from workers.attempt import STALE, Attempt, Stop

AGAIN_S = 0.1
"After an engine first looks frozen, when it is looked at again before that is believed."

BLIND_S = 1.0
"A worker that itself stood still for so long cannot say that the engine was silent."


class Vigil:
    """One engine's. Ticks are `perf_counter`, moments unix seconds on Redis' clock."""

    def __init__(
        self, settings: WorkerSettings, clock: Callable[[], float], sooner: Callable[[], None]
    ) -> None:
        """`clock` says what time it is on Redis; `sooner` is called when something is due before all else was."""
        self._settings, self._clock, self._sooner = settings, clock, sooner
        self._due_tick = float("inf")
        self._looked_tick = 0.0

    def due_s(self) -> float:
        """Seconds until something may be over; `inf`: there is nothing."""
        return self._due_tick - perf_counter()

    def arrived(self, attempt: Attempt) -> None:
        """It may expire, or the KV that it is to fetch."""
        for until_at in (attempt.job.deadline_at, attempt.kv_until_at):
            if until_at is not None:
                self._look_by(perf_counter() + until_at - self._clock())

    def began(self, tick: float) -> None:
        """The engine was given a request."""
        self._look_by(tick + self._settings.first_token_s)

    def spoke(self, tick: float) -> None:
        """The engine gave a first token, and now one must follow another."""
        self._look_by(tick + min(self._settings.gap_s, self._settings.stall_s))

    def over(
        self, attempts: Collection[Attempt], heard_tick: float
    ) -> Iterator[tuple[Attempt, Stop]]:
        """Those whose time has run out, and why; the next look is at the earliest that another's can.

        Args:
            attempts: everything not gone.
            heard_tick: when the engine last sent anything.
        """
        now, tick = self._clock(), perf_counter()
        self._due_tick = float("inf")
        for attempt in attempts:
            if attempt.stage not in ("held", "running") or attempt.stop is not None:
                continue  # it ends already
            self.arrived(attempt)
            deadline_at = attempt.job.deadline_at
            if deadline_at is not None and now > deadline_at:
                yield attempt, Stop("expired", "its deadline has passed")
            elif attempt.kv_until_at is not None and now >= attempt.kv_until_at:
                yield attempt, STALE
            elif attempt.stage == "running":
                yield from self._silent(attempt, tick)
        if _has_begun(attempts):
            self._look_by(max(heard_tick + self._settings.stall_s, tick + AGAIN_S))

    def stalled(self, running: Collection[Attempt], heard_tick: float) -> str:
        """While answers are under way some token comes every step; none at all from anywhere is a frozen engine.

        Returns:
            Why it is taken to be one; empty where it is not, or not surely yet.
        """
        tick = perf_counter()
        was_blind = tick - self._looked_tick > BLIND_S
        self._looked_tick = tick
        stall_s = self._settings.stall_s
        if was_blind or not _has_begun(running) or tick - heard_tick <= stall_s:
            return ""
        return f"the engine sent nothing for {stall_s:g} s with {len(running)} answers under way"

    def _silent(self, attempt: Attempt, tick: float) -> Iterator[tuple[Attempt, Stop]]:
        limit_s, what = self._patience(attempt)
        if tick - attempt.last_tick > limit_s:
            yield attempt, Stop("silent", f"the engine was silent for {limit_s:g} s {what}")
        else:
            self._look_by(attempt.last_tick + limit_s)

    def _patience(self, attempt: Attempt) -> tuple[float, str]:
        """How long it may say nothing, and what that would be."""
        settings = self._settings
        if attempt.answer.is_done:
            return min(settings.gap_s, settings.stall_s), "after [DONE]"
        if attempt.first_token_at is not None:
            return settings.gap_s, "between two tokens"
        return settings.first_token_s, "before the first token"

    def _look_by(self, tick: float) -> None:
        if tick < self._due_tick:
            self._due_tick = tick
            self._sooner()


def _has_begun(attempts: Collection[Attempt]) -> bool:
    return any(
        one.stage == "running" and one.first_token_at is not None and not one.answer.is_done
        for one in attempts
    )
