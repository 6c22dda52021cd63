"""The engine's virtual time on the event loop's clock.

A step that should have ended is delivered as soon as the loop gets round to it, and the
next starts where it ended, not where it was delivered. So a late process never stretches
steps: it hands out several at once, and errors do not add up.
"""

import asyncio
from collections.abc import Callable

from scheduler.sim.engine import Engine
from scheduler.sim.sequence import Sequence
from scheduler.sim.step import Step

STEPS_A_TURN = 64
"Steps delivered before the loop may see to its sockets; 64 take about a millisecond."

TIMER_GRAIN_S = 0.0005
"""
Added to every timer, so that none fires before its step is over.

uvloop rounds to whole milliseconds, also down. A timer that fires early would be set again
for no time at all, and the loop would spin: measured 400 us of CPU a step in place of 100.
"""


class Pacer:
    """Runs an engine in time.

    1. `add` brings the engine up to now, then hands it the request.
    2. A step runs: the engine is already past it, the clients do not know yet.
    3. At its end `deliver` is called with it, and the next begins at that moment.
    4. After every burst of deliveries `flush` is called once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        time_scale: float,
        deliver: Callable[[Step], None],
        flush: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._scale = time_scale
        self._deliver = deliver
        self._flush = flush
        self._origin = self._loop.time()
        self._step: Step | None = None
        self._timer: asyncio.Handle | None = None
        self._is_stopped = False
        self.stepped: Callable[[], None] | None = None
        "Called whenever the engine has begun a step, or found nothing to do."

    def now(self) -> float:
        """Engine seconds since the start."""
        return (self._loop.time() - self._origin) * self._scale

    def wall_s(self, engine_s: float) -> float:
        """Wall seconds that so many engine seconds take."""
        return engine_s / self._scale

    def add(self, sequence: Sequence) -> None:
        """Hand a request to the engine now; raises what `Engine.add` raises."""
        self._catch_up()
        self._engine.add(sequence)
        self.kick()

    def kick(self) -> None:
        """Something changed: an idle engine may have work again.

        The step starts on the loop's next turn, so that requests which arrive together
        share it.
        """
        if self._step is None and self._timer is None and not self._is_stopped:
            self._timer = self._loop.call_soon(self._turn)

    def stop(self) -> None:
        """No more steps; for a dying engine or a closing server."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn(self) -> None:
        self._timer = None
        if self._step is None:
            self._begin(self.now())
        is_level = self._catch_up(STEPS_A_TURN)
        if self._step is None or self._is_stopped or self._timer is not None:
            return
        if is_level:
            ends_at = self._origin + self._step.ended_at / self._scale
            self._timer = self._loop.call_at(ends_at + TIMER_GRAIN_S, self._turn)
        else:
            self._timer = self._loop.call_soon(self._turn)

    def _begin(self, now: float) -> None:
        self._step = self._engine.step(now)
        if self.stepped is not None:
            self.stepped()

    def _catch_up(self, limit: int | None = None) -> bool:
        """Deliver steps that are over; False when there were more than `limit`."""
        now, n_delivered = self.now(), 0
        while self._step is not None and self._step.ended_at <= now:
            if n_delivered == limit or self._is_stopped:
                break
            step, self._step = self._step, None
            self._deliver(step)
            self._begin(step.ended_at)
            n_delivered += 1
        if n_delivered:
            self._flush()
        return n_delivered != limit
