"""The core: events in, commands out; the time is an argument.

How a request is decided:
    1. `receive(Arrived)`   its promise is made out and it stands in line (`requests`: `slo`, `order`)
    2. `receive(Beat)`      an endpoint says what it can take and what it has begun (`endpoints`: `fleet`, `ledger`)
    3. `decide`             plans the most urgent onto the endpoints, in predicted seconds (`planning`: `plan`, `predict`)
    4. `Assign`             only what starts within the commit window leaves; the ledger knows at once (`assign`)
    5. `receive(Reward)`    it is finished or waits again, and the predictor has learned one completion more

Three drivers use it: the live loop, the simulator's heap and the replayer. The same facts at the same times give
the same commands, byte for byte (I5, I6).
"""

import numpy as np

from scheduler import view
from scheduler.endpoints import Endpoints
from scheduler.events import Arrived, Command, Event, Recovered, Refused
from scheduler.learned import Learned
from scheduler.memory import CoreSettings, Memory
from scheduler.planning import Planning
from scheduler.requests import Requests
from scheduler.view import Snapshot, View
from scheduler.wire.client import Control
from scheduler.wire.worker import Beat, Reward

__all__ = ("CoreSettings", "Scheduler")


class Scheduler:
    """Decides for one pool. Owned by one driver; holds no lock, no clock and no socket."""

    def __init__(self, settings: CoreSettings, rng: np.random.Generator) -> None:
        """Start empty, knowing no endpoint."""
        self.settings = settings
        self._memory = Memory(settings)
        self._requests = Requests(self._memory)
        self._endpoints = Endpoints(self._memory, self._requests)
        self._planning = Planning(self._memory, rng)

    def receive(self, event: Event, now: float) -> None:
        """Take in an event. Costs microseconds; the commands that follow from it come with the next `decide`."""
        self._pass_time(now)
        match event:
            case Arrived():
                self._requests.arrived(event)
            case Beat():
                self._endpoints.beat(event)
            case Reward():
                self._endpoints.reward(event)
            case Control(action="cancel"):
                self._requests.cancel(event)
            case Control():
                self._endpoints.drain(event)
            case Refused():
                self._requests.refused(event)
            case Recovered():
                held = self._requests.recovered(event)
                if held is not None:
                    self._endpoints.recovered(held, event)

    def decide(self, now: float) -> list[Command]:
        """The commands to carry out now, in this order. The work is bounded however many requests wait (I8)."""
        self._pass_time(now)
        self._endpoints.take_back_the_lost()
        if self._requests.has_news:
            self._requests.abort_the_cancelled()
        self._requests.end_the_late()
        self._requests.refuse_strange_models()
        self._requests.refuse_the_too_long()
        self._planning.step()
        return self._memory.outbox.take()

    def settle(self) -> None:
        """Do now, while nobody waits, what the next call would else do first.

        Records what the last `decide` handed over and recomputes the predictions. Optional: it returns nothing and
        changes no later command.
        """
        self._planning.settle()
        self._memory.predictor.refresh(self._memory.book.ledger.decode_kv)

    def wakeup_at(self) -> float | None:
        """When `decide` could give other commands without a new event, unix seconds; None: not before one."""
        now, end_at = self._memory.now, self._memory.book.next_end_at()
        if self._memory.outbox or self._endpoints.has_news or self._requests.has_news:
            return now
        moments = [
            *self._endpoints.moments(),
            *self._requests.moments(),
            *self._planning.moments(),
            *([] if end_at is None else [end_at]),
        ]
        return max(now, min(moments)) if moments else None

    def view(self, now: float) -> View:
        """Figures for metrics and people at this moment; changes nothing."""
        return view.of(self._memory.book, self._memory.predictor, now)

    def learned(self) -> Learned:
        """What a new leader takes over."""
        return self._memory.predictor.export(tuple(self._memory.book.fleet.known_models))

    def snapshot(self, *, with_requests: bool = True) -> Snapshot:
        """Everything, in plain numbers and words. Without requests its cost does not grow with how many there are."""
        return view.snapshot(
            self._memory.book,
            self._memory.predictor,
            learned=self.learned(),
            policy=self.settings.policy.label,
            now=self._memory.now,
            with_requests=with_requests,
        )

    def restore(self, snapshot: Snapshot) -> bool:
        """Start warm from another leader's snapshot; False: what it learned was unusable, and the predictor stays untaught.

        Takes over what was learned, what tenants have had and which endpoints people have drained. The requests that
        wait and run come as `Recovered`.
        """
        for name in snapshot.drained:
            self._memory.book.fleet.drain(name, is_drained=True)
        tenants = self._memory.book.lines.by_tenant
        if tenants is not None and snapshot.given.is_sound():
            tenants.accounts.restore(snapshot.given)
        if not self._memory.predictor.restore(snapshot.learned):
            return False
        known = dict.fromkeys(snapshot.learned.models)
        self._memory.book.fleet.known_models.update(known)
        return True

    def _pass_time(self, now: float) -> None:
        assert now >= self._memory.now, f"time went back from {self._memory.now!r} to {now!r} (I4)"
        self._planning.settle()
        self._memory.now = now
