"""One engine run through virtual time: a step after the other, or asleep while it only decodes.

1. `begin`     nothing is under way: the next step starts, or a stretch in which nothing but tokens can come
2. `next_at`   when that is over
3. `over`      the steps that have ended by now, each before the next starts
"""

import math
from collections.abc import Callable, Iterator

from scheduler.sim.engine import Engine
from scheduler.sim.step import Step

QUIET_LEAST_S = 0.05
"A shorter stretch of decoding is run step by step."

QUIET_SHARE = 0.98
"Of the mean length of a stretch, the part we dare to sleep through: noise may end it sooner."


class Course:
    """Of one life of an engine."""

    def __init__(self, engine: Engine, started: Callable[[float], None]) -> None:
        """Nothing is under way; `started` is called with its moment whenever a step has been started."""
        self._engine = engine
        self._started = started
        self._step: Step | None = None
        self._at = 0.0
        "Up to here the engine has been run."
        self._quiet_until: float | None = None

    def next_at(self) -> float:
        """When a step ends, or a quiet stretch; `inf`: nothing is under way."""
        if self._step is not None:
            return self._step.ended_at
        return math.inf if self._quiet_until is None else self._quiet_until

    def left_s(self, now: float) -> float:
        """Seconds until the step under way ends; 0 without one."""
        return 0.0 if self._step is None else max(self._step.ended_at - now, 0.0)

    def over(self, now: float) -> Iterator[Step]:
        """Run up to this moment; every step that has ended by then is to be settled before the next is asked for."""
        if self._quiet_until is not None:
            self._quiet_until = None
            self._run(until=now)
        while (step := self._step) is not None and step.ended_at <= now:
            self._at = step.ended_at
            self._step = None
            yield step
            if self._at < now:
                self._run(until=now)

    def begin(self, now: float) -> None:
        """Start the next step, or sleep through a stretch in which only tokens are decoded, unless something is under way."""
        if self._step is not None or self._quiet_until is not None:
            return
        self._at = now
        quiet_s = self._engine.quiet_s()
        if quiet_s is not None and quiet_s > QUIET_LEAST_S:
            self._quiet_until = now + QUIET_SHARE * quiet_s
        else:
            self._run()

    def _run(self, until: float | None = None) -> None:
        self._step = self._engine.step(self._at, until=until)
        self._started(self._at)
