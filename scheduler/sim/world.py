"""The simulator's heap: arrivals, a dispatcher, endpoints and the delays between them.

    1. an arrival is enqueued; a hop later the dispatcher reads it (`receive`)
    2. a turn later it decides (`decide`); facts that came meanwhile are decided on together
    3. an `Assign` reaches its endpoint's worker a hop later
    4. what the worker says (beats, rewards) reaches the dispatcher a hop after it is said
    5. whatever the dispatcher asks to be woken for (`wakeup_at`) is a turn as well

The dispatcher is anything of the core's shape: the core that ships, or a baseline. It is handed what a dispatcher
reads from Redis and nothing else; true lengths stay in `Fate` and in the engines.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Literal, Protocol

from scheduler.events import Abort, Arrived, Assign, Command, Event, Finish, Reclaim
from scheduler.sim import chain, truth, visits
from scheduler.sim.arriving import MODEL, Row
from scheduler.sim.endpoint import Endpoint
from scheduler.sim.fate import Fate
from scheduler.sim.fleet import Delays, Fault, Links, Machine
from scheduler.sim.handover import Handover
from scheduler.sim.mirror import Text
from scheduler.sim.network import Network
from scheduler.sim.sequence import Sequence as Prompt
from scheduler.sim.visits import Visit
from scheduler.wire.client import Control
from scheduler.wire.dispatcher import Job
from scheduler.wire.worker import Beat, Reward

DRAIN_LEAST_S = 300.0
"After the last arrival a run goes on for three times its span, and at least for so long."

DRAIN_SPANS = 3.0

VISIT = "visit-"
"Begins the ids of others' requests."

Timer = Callable[[], int]
"Nanoseconds of a real clock, handed in by whoever has one: how long deciding took."


Moment = tuple[float, int, int, int, float]
"Seconds, running, waiting in the engine, held by the worker, KV usage."


class Dispatch(Protocol):
    """The core's shape."""

    def receive(self, event: Event, now: float) -> None: ...

    def decide(self, now: float) -> list[Command]: ...

    def wakeup_at(self) -> float | None: ...


class World:
    """One run of one dispatcher over one workload on one fleet."""

    def __init__(
        self,
        rows: Sequence[Row],
        machines: Sequence[Machine],
        *,
        delays: Delays,
        is_open: bool,
        links: Links | None = None,
        scrapes: bool = False,
        publishes: bool = False,
        is_told: bool = True,
        others: Sequence[Visit] = (),
        faults: Sequence[Fault] = (),
        closed: bool = False,
        timer: Timer | None = None,
    ) -> None:
        """Set the stage.

        Args:
            rows: the workload, in order of time.
            machines: the fleet as this seed made it.
            delays: between a fact and the decision on it.
            is_open: endpoints take everything into the engine at once; otherwise their workers admit.
            links: between endpoints, where KV is handed over; absent: as a fleet has them by default.
            scrapes: beats come as often as engines are scraped, for a dispatcher that reads engines' figures.
            publishes: engines say what they cache, and beats carry it on.
            is_told: clients that give up tell the dispatcher; otherwise their connections close, as before the
                field's routers, and who waits there is found gone when its turn comes.
            others: requests that go to engines past the dispatcher, in order of time.
            faults: what befalls whom.
            closed: a turn of a conversation comes when the turn before has ended and its pause is over.
            timer: for `decide_ns`; absent: not measured.
        """
        links = links or Links()
        self.fates = [Fate(at, row.arrival, row.weight) for at, row in enumerate(rows)]
        self.decide_ns: list[int] = []
        self.aborts = 0
        self.timeline: list[Moment] = []
        "The first endpoint's load at each of its beats."
        self.now = 0.0
        self.endpoints = {
            machine.name: Endpoint(
                machine,
                delays,
                is_open=is_open,
                report=self._report,
                fence=self._counts,
                models=machine.models or (MODEL,),
                kv_lease_s=links.kv_lease_s,
                text_of=self._text if publishes else None,
            )
            for machine in machines
        }
        self._handover = self._open_links(machines, links)
        self._first = self.endpoints[machines[0].name]
        self._rows = rows
        self._others = others
        self._is_told = is_told
        self._gone: set[str] = set()
        "Whose clients gave up, where the dispatcher is not told."
        self._delays = delays
        self._beat_s = min(delays.beat_s, delays.scrape_s) if scrapes else delays.beat_s
        self._faults = faults
        self._closed = closed
        self._timer = timer
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()
        self._wakes: dict[str, float] = dict.fromkeys(self.endpoints, math.inf)
        self._decide_at = math.inf
        self._open = len(self.fates)
        "Requests without an end."
        self._holders: dict[str, tuple[str, int]] = {}
        "By request: the endpoint and attempt that count."
        self._waiting_turns: dict[int, list[int]] = {}

    def run(self, dispatch: Dispatch, *, drain_s: float | None = None) -> None:
        """Play it to its end: until all have ended, or `drain_s` after the last arrival."""
        self._dispatch = dispatch
        span_s = self._rows[-1].arrival.at_s if self._rows else 0.0
        end_s = span_s + (max(DRAIN_LEAST_S, DRAIN_SPANS * span_s) if drain_s is None else drain_s)
        self._open_fleet()
        self._plan_arrivals()
        heap = self._heap
        while heap and self._open:
            at, _, act, what = heappop(heap)
            if at > end_s:
                break
            self.now = at
            act(*what)

    def truth(self, request_id: str, endpoint: str) -> float:
        """True seconds to a request's first token on an endpoint; only the oracle is handed this."""
        arrival, found = self.fates[int(request_id)].arrival, self.endpoints[endpoint]
        if found.is_dead or found.is_frozen:
            return math.inf
        keys = chain.keys(arrival, found.machine.settings.block_size)
        seconds = found.first_token_s(arrival.prompt_tokens, keys, self.now)
        self._attend(found)
        return seconds

    # Setting out.

    def _open_fleet(self) -> None:
        first_turn: dict[str, Fault] = {}
        for fault in self._faults:
            if fault.kind in ("die", "join"):
                first_turn.setdefault(fault.endpoint, fault)
            self._at(fault.at_s, self._befall, fault)
        for at, (name, endpoint) in enumerate(self.endpoints.items()):
            turn = first_turn.get(name)
            # Later beats come one after the other, not all at once.
            self._at(self._beat_s * (at + 1) / len(self.endpoints), self._beat, endpoint)
            if turn is not None and turn.kind == "join":
                endpoint.die()
            else:  # known before the first arrival
                self._dispatch.receive(endpoint.beat(0.0), 0.0)

    def _open_links(self, machines: Sequence[Machine], links: Links) -> Handover | None:
        """The links between endpoints; None where nobody hands KV over."""
        if not any(machine.role == "prefill" for machine in machines):
            return None
        network = Network({m.name: m.link_gbps for m in machines}, links.latency_s)
        handover = Handover(
            self.endpoints,
            network,
            lambda at, act: self._at(max(at, self.now), act, at),
            lambda name: self._attend(self.endpoints[name]),
        )
        for endpoint in self.endpoints.values():
            endpoint.handover = handover
        return handover

    def _plan_arrivals(self) -> None:
        for at, row in enumerate(self._rows):
            parent = row.arrival.parent
            if self._closed and parent is not None:
                self._waiting_turns.setdefault(parent, []).append(at)
        held_back = {at for turns in self._waiting_turns.values() for at in turns}
        self._expect(
            (row.arrival.at_s, partial(self._arrive, at))
            for at, row in enumerate(self._rows)
            if at not in held_back
        )
        self._expect(
            (visit.row.arrival.at_s, partial(self._visit, at))
            for at, visit in enumerate(self._others)
        )

    def _expect(self, series: Iterator[tuple[float, Callable[[], None]]]) -> None:
        """Of what comes in order of time only the next stands in the heap."""
        following = next(series, None)
        if following is not None:
            at_s, act = following
            self._at(at_s, self._go_on, act, series)

    def _go_on(
        self, act: Callable[[], None], series: Iterator[tuple[float, Callable[[], None]]]
    ) -> None:
        act()
        self._expect(series)

    def _arrive(self, row: int) -> None:
        self.fates[row].enqueued_at = self.now
        event = Arrived(request=self._rows[row].request, entry=f"{row}-0", enqueued_at=self.now)
        self._at(self.now + self._delays.hop_s, self._hear, event)
        cancel_s = self._rows[row].cancel_s
        if cancel_s is not None:
            self._at(self.now + cancel_s, self._give_up, row)

    def _give_up(self, row: int) -> None:
        """A client wants its answer no more, if that has not ended."""
        request_id = str(row)
        if self.fates[row].end != "unfinished":
            return
        if self._is_told:
            self._hear(Control(action="cancel", id=request_id))
            return
        self._gone.add(request_id)
        held = self._holders.get(request_id)
        if held is not None:
            endpoint = self.endpoints[held[0]]
            self._at(self.now + self._delays.hop_s, self._abort, endpoint, request_id, held[1])

    def _visit(self, at: int) -> None:
        endpoint = self.endpoints[self._others[at].endpoint]
        prompt = visits.prompt(self._others[at], f"{VISIT}{at}", endpoint.machine)
        if prompt is not None:
            endpoint.visit(prompt, self.now)
            self._attend(endpoint)

    def _text(self, sequence_id: str) -> Text:
        """A prompt as requests on the wire name it."""
        if sequence_id.startswith(VISIT):
            row = self._others[int(sequence_id.removeprefix(VISIT))].row
        else:
            row = self._rows[int(sequence_id)]
        return row.request.blocks, row.block_tokens

    # The dispatcher.

    def _hear(self, event: Event) -> None:
        self._dispatch.receive(event, self.now)
        self._decide_by(self.now + self._delays.turn_s)

    def _decide_by(self, at: float) -> None:
        if at < self._decide_at:
            self._decide_at = at
            self._at(at, self._decide, at)

    def _decide(self, planned_at: float) -> None:
        if planned_at != self._decide_at:
            return
        self._decide_at = math.inf
        begun = self._timer() if self._timer else 0
        commands = self._dispatch.decide(self.now)
        if self._timer:
            self.decide_ns.append(self._timer() - begun)
        for command in commands:
            self._carry_out(command)
        wanted_at = self._dispatch.wakeup_at()
        if wanted_at is not None:
            # One turn ahead at least: a dispatcher that cannot wait still needs its turn's time.
            self._decide_by(max(wanted_at, self.now + max(self._delays.turn_s, 1e-6)))

    def _carry_out(self, command: Command) -> None:
        match command:
            case Assign():
                self._assign(command.job, command.endpoint)
            case Reclaim():
                self._holders.pop(command.id, None)
            case Finish():
                fate = self.fates[int(command.result.id)]
                outcome = "cancelled" if command.result.id in self._gone else command.result.outcome
                fate.end = outcome if outcome in ("expired", "rejected", "cancelled") else "failed"
                self._ended(fate)
            case Abort():
                self.aborts += 1
                endpoint, moment = self.endpoints[command.endpoint], self.now + self._delays.hop_s
                self._at(moment, self._abort, endpoint, command.id, command.attempt)
            case _:
                pass  # notes and duplicates move nothing

    def _assign(self, job: Job, name: str) -> None:
        fate = self.fates[int(job.id)]
        fate.attempts += 1
        if job.leg != "decode":
            engines = [one.engine for one in self.endpoints.values() if not one.is_dead]
            fate.believed_tokens = job.cached_tokens
            fate.best_tokens = truth.best_cached_tokens(engines, fate.arrival)
        self._holders[job.id] = (name, job.attempt)
        self._at(self.now + self._delays.hop_s, self._deliver, self.endpoints[name], job, fate)

    # The endpoints.

    def _deliver(self, endpoint: Endpoint, job: Job, fate: Fate) -> None:
        arrival, machine = fate.arrival, endpoint.machine
        room = machine.tokens_max - arrival.prompt_tokens
        if job.id in self._gone:
            self._end(endpoint, job, fate, "cancelled")
            return
        if room < 1:  # the engine answers 400: the prompt alone is longer than all it has room for
            self._end(endpoint, job, fate, "failed")
            return
        prompt = Prompt(
            job.id,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=1 if job.leg == "prefill" else arrival.output_tokens,
            keys=chain.keys(arrival, machine.settings.block_size),
            max_tokens=room,
            priority=-job.priority,
            hands_over=job.leg == "prefill",
            is_remote=job.leg == "decode",
        )
        endpoint.receive(job, prompt, fate, self.now)
        self._attend(endpoint)

    def _end(
        self, endpoint: Endpoint, job: Job, fate: Fate, outcome: Literal["failed", "cancelled"]
    ) -> None:
        """It ends before it has begun."""
        fate.end = outcome
        reward = Reward(
            id=job.id,
            endpoint=endpoint.name,
            epoch=endpoint.epoch,
            attempt=job.attempt,
            outcome=outcome,
        )
        self._report(self.now, reward)

    def _attend(self, endpoint: Endpoint) -> None:
        at = endpoint.next_at()
        if at != self._wakes[endpoint.name]:
            self._wakes[endpoint.name] = at
            if at < math.inf:
                self._at(at, self._wake, endpoint, at)

    def _wake(self, endpoint: Endpoint, planned_at: float) -> None:
        if planned_at == self._wakes[endpoint.name]:
            self._wakes[endpoint.name] = math.inf
            endpoint.turn(self.now)
            self._attend(endpoint)

    def _beat(self, endpoint: Endpoint) -> None:
        self._at(self.now + self._beat_s, self._beat, endpoint)
        if not (endpoint.is_dead or endpoint.is_frozen):
            endpoint.turn(self.now)
            self._attend(endpoint)
            beat = endpoint.beat(self.now)
            self._report(self.now, beat)
            if endpoint is self._first:
                self.timeline.append(
                    (self.now, beat.running, beat.queued, beat.held, beat.kv_usage)
                )

    def _abort(self, endpoint: Endpoint, request_id: str, attempt: int) -> None:
        endpoint.abort(request_id, attempt, self.now)
        self._attend(endpoint)

    def _befall(self, fault: Fault) -> None:
        endpoint = self.endpoints[fault.endpoint]
        match fault.kind:
            case "slow":
                endpoint.slow(fault.factor, self.now)
            case "freeze":
                endpoint.freeze(self.now)
            case "thaw":
                endpoint.thaw(self.now)
            case "die":
                endpoint.die()
                if self._handover is not None:
                    self._handover.died(endpoint.name, self.now)
            case "join":
                endpoint.join()
                self._report(self.now, endpoint.beat(self.now))
            case "drain" | "resume":
                endpoint.is_draining = fault.kind == "drain"
                if not endpoint.is_dead:
                    self._report(self.now, endpoint.beat(self.now))
        self._attend(endpoint)

    def _report(self, at: float, fact: Beat | Reward) -> None:
        """A worker says something; whoever lost the lease is not listened to."""
        if isinstance(fact, Reward):
            if not self._counts(fact.id, fact.attempt):
                return
            del self._holders[fact.id]
            if fact.outcome not in ("returned", "prefilled"):
                self._ended(self.fates[int(fact.id)])
        self._at(max(at, self.now) + self._delays.hop_s, self._hear, fact)

    def _counts(self, request_id: str, attempt: int) -> bool:
        held = self._holders.get(request_id)
        return held is not None and held[1] == attempt

    def _ended(self, fate: Fate) -> None:
        self._open -= 1
        for row in self._waiting_turns.get(fate.row, ()):
            # From the moment at which the turn before was asked, as traces count pauses.
            asked_at = fate.enqueued_at + (self._rows[row].arrival.gap_s or 0.0)
            self._at(max(self.now, asked_at), self._arrive, row)

    def _at(self, at: float, act: Callable[..., None], *what: object) -> None:
        heappush(self._heap, (at, next(self._order), act, what))
