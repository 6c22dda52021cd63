"""The two ways of working at a desk: bind at arrival, or keep a central line and bind late."""

from collections import deque
from typing import Protocol

import numpy as np

from scheduler.events import Arrived, Command, Event
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.senses import Asked
from scheduler.state import Bools
from scheduler.wire.worker import Beat, Reward


class Router(Protocol):
    """Binds a request to a slot at the moment it comes."""

    def choose(self, asked: Asked, slots: list[int], now: float) -> int | None:
        """One of `slots`, which is never empty; None refuses the request."""
        ...


class Order(Protocol):
    """Says who of a central line goes next."""

    def add(self, asked: Asked) -> None: ...

    def pop(self, now: float) -> Asked | None:
        """The next to be served; None: nobody (for now)."""
        ...

    def dropped(self) -> list[Asked]:
        """Those given up since it was last asked."""
        ...

    def __len__(self) -> int: ...


class Bound:
    """Early binding: every request gets its endpoint in the turn in which it comes."""

    def __init__(self, desk: Desk, router: Router) -> None:
        self._desk = desk
        self._router = router
        self._new: deque[Asked] = deque()

    def receive(self, event: Event, now: float) -> None:
        match event:
            case Arrived():
                self._new.append(Asked(event.request, event.entry, event.enqueued_at))
            case Beat():
                self._new.extend(self._desk.hear(event, now))
            case Reward():
                self._desk.learn(event, now)
                learn = getattr(self._router, "learn", None)
                if learn is not None:
                    learn(event, now)

    def decide(self, now: float) -> list[Command]:
        for slot in self._desk.silent(now):
            self._new.extend(self._desk.lose(slot, now))
        commands = self._desk.reclaims()
        for _ in range(len(self._new)):
            asked = self._new.popleft()
            slots = self._desk.living(asked, now)
            if not slots:
                if self._desk.is_possible(asked):
                    self._new.append(asked)
                else:
                    commands.append(
                        self._desk.refuse(asked, "nobody serves its model, or its length", now)
                    )
                continue
            chosen = self._router.choose(asked, slots, now)
            if chosen is None:
                commands.append(self._desk.refuse(asked, "its promise cannot be kept", now))
            else:
                commands.append(self._desk.send(asked, chosen, now))
        return commands

    def take_back(self, asked: Asked) -> None:
        """An endpoint has handed it back."""
        self._new.append(asked)

    def wakeup_at(self) -> float | None:
        return self._desk.lapse_at()


class Lined:
    """Late binding: one central line; an endpoint is given its next when it is nearly free.

    Nearly free is by predicted seconds, and the endpoint is the one where the chosen request ends its prefill first.
    """

    def __init__(self, desk: Desk, order: Order, window_s: float) -> None:
        self._desk = desk
        self._order = order
        self._window_s = window_s
        self._room_at: float | None = None
        self._stuck: list[Asked] = []

    def receive(self, event: Event, now: float) -> None:
        match event:
            case Arrived():
                self._order.add(Asked(event.request, event.entry, event.enqueued_at))
            case Beat():
                for asked in self._desk.hear(event, now):
                    self._order.add(asked)
            case Reward():
                self._desk.learn(event, now)

    def decide(self, now: float) -> list[Command]:
        for slot in self._desk.silent(now):
            for asked in self._desk.lose(slot, now):
                self._order.add(asked)
        for asked in self._stuck:
            self._order.add(asked)
        self._stuck = []
        commands = self._desk.reclaims()
        while len(self._order) and self._free(now).any():
            chosen = self._order.pop(now)
            if chosen is None:
                break
            command = self._place(chosen, now)
            if command is not None:
                commands.append(command)
        commands += [
            self._desk.refuse(asked, "its promise cannot be kept", now)
            for asked in self._order.dropped()
        ]
        self._plan_wakeup(now)
        return commands

    def take_back(self, asked: Asked) -> None:
        """An endpoint has handed it back."""
        self._order.add(asked)

    def _place(self, asked: Asked, now: float) -> Command | None:
        desk = self._desk
        living = desk.living(asked, now)
        free = self._free(now)
        slots = [slot for slot in living if free[slot]]
        if not slots:
            if not desk.is_possible(asked):
                return desk.refuse(asked, "nobody serves its model, or its length", now)
            self._stuck.append(asked)
            return None
        cached = desk.prefixes.match(asked)
        total_s = desk.costs.backlog_s(now) + desk.costs.service_s(asked, cached)
        slot = min(slots, key=lambda at: (float(total_s[at]), at))
        return desk.send(asked, slot, now, float(total_s[slot]))

    def _free(self, now: float) -> Bools:
        desk = self._desk
        seats = np.array([beat.max_num_seqs for beat in desk.beats])
        kv = np.array([beat.kv_tokens for beat in desk.beats])
        roomy = (desk.ledger.seats < seats) & ((desk.ledger.kv < kv) | (desk.ledger.seats == 0))
        roomy &= desk.takes_first()
        found: Bools = roomy & desk.is_heard(now) & (desk.costs.backlog_s(now) <= self._window_s)
        return found

    def _plan_wakeup(self, now: float) -> None:
        self._room_at = None
        if len(self._order) or self._stuck:
            wait_s = self._desk.costs.backlog_s(now) - self._window_s
            ahead = wait_s[wait_s > 0]
            self._room_at = now + max(0.01, float(ahead.min()) if len(ahead) else 0.05)

    def wakeup_at(self) -> float | None:
        moments = [at for at in (self._desk.lapse_at(), self._room_at) if at is not None]
        return min(moments) if moments else None
