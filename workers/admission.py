"""Who of the held goes into the engine now: as many as the promises of the batch allow."""

from collections.abc import Callable
from time import perf_counter

from scheduler import batching
from scheduler.batching import Limits
from scheduler.settings import EngineAddress, WorkerSettings
from workers.attempt import Attempt
from workers.hands import Hands
from workers.health import Health
from workers.rhythm import Rhythm


class Admission:
    """One engine's door."""

    def __init__(
        self,
        address: EngineAddress,
        settings: WorkerSettings,
        *,
        health: Health,
        rhythm: Rhythm,
        hands: Hands,
        clock: Callable[[], float],
    ) -> None:
        """`clock` says what time it is on Redis."""
        self._address, self._settings, self._clock = address, settings, clock
        self._health, self._rhythm, self._hands = health, rhythm, hands

    def chosen(self) -> list[Attempt]:
        """Those that may go in, in this order; none while the engine is away or doubted."""
        if not self._hands.held or self._health.away or self._health.is_doubted:
            return []
        held = list(self._hands.held.values())
        if len(held) == 1 and not self._hands.running:
            return held  # an empty batch always takes one
        tick = perf_counter()
        places = batching.admit(
            [attempt.member(tick) for attempt in self._hands.running.values()],
            [attempt.candidate() for attempt in held],
            self._rhythm.step_time.law,
            self._limits(),
            self._clock(),
        )
        return [held[place] for place in places]

    def _limits(self) -> Limits:
        settings = self._settings
        return Limits(
            seats=self._address.max_num_seqs,
            step_s=settings.step_s or float("inf"),
            margin=settings.margin,
            patience_s=settings.patience_s,
        )
