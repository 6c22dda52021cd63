"""What a router of the field has on its desk, and the two ways of working there.

A baseline is handed at birth exactly the senses that the real one has, as objects of these types; what it is not
handed it cannot read. How old each is, is part of the type:

    Account    the router's own book of what it has sent: exact at once for sending; answers count when they pass
    Scrapes    figures of engines: as old as a scrape and a hop
    Prefixes   the router's own guess of caches, from what it has sent: never corrected
    Costs      predicted seconds, from the same learned cost model that ships; learned when answers pass
"""

from collections import deque
from typing import Protocol

import msgspec
import numpy as np

from scheduler import cost
from scheduler.events import Arrived, Assign, Command, Event, Finish, Reclaim
from scheduler.ledger import Ledger, Line
from scheduler.predict import Predictor
from scheduler.prefix import BLOCK_TOKENS, Index
from scheduler.state import Bools, Floats
from scheduler.wire import Beat, Decision, Job, Leg, Request, Result, Reward

NEVER = float("inf")


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A request as its reader sees it."""

    request: Request
    entry: str
    enqueued_at: float

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_tokens(self) -> int:
        return self.request.prompt_tokens or 1

    @property
    def due_at(self) -> float:
        """When the first token is due; `inf` without a promise."""
        ttft_s, deadline_s = self.request.ttft_s, self.request.deadline_s
        promised = min(NEVER if s is None else s for s in (ttft_s, deadline_s))
        return self.enqueued_at + promised


class Account:
    """What was sent to each slot and has not been answered, by the router's own book."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def requests(self) -> list[float]:
        """Requests in flight."""
        found: list[float] = self._ledger.seats.tolist()
        return found

    def prefill_tokens(self) -> list[float]:
        """Uncached prompt tokens whose first token has not been seen."""
        found: list[float] = self._ledger.tokens.tolist()
        return found

    def kv_tokens(self) -> list[float]:
        """Prompts (and usual answers) of all in flight."""
        found: list[float] = self._ledger.kv.tolist()
        return found


class Scrapes:
    """Each engine's own figures at its last scrape."""

    def __init__(self, beats: list[Beat]) -> None:
        self._beats = beats

    def running(self) -> list[int]:
        return [beat.running for beat in self._beats]

    def waiting(self) -> list[int]:
        """In the engine's own line."""
        return [beat.queued for beat in self._beats]

    def kv_usage(self) -> list[float]:
        return [beat.kv_usage for beat in self._beats]


class Prefixes:
    """Which prompts were sent where, in blocks of 128 tokens; least recently used go first."""

    def __init__(self, blocks_max: int) -> None:
        """Remember at most `blocks_max` blocks a slot: the router's own limit, it does not ask the engine."""
        self._index = Index(blocks_max)
        self._n_slots = 0

    def open(self, slot: int) -> None:
        self._index.open(slot, 0)
        self._n_slots = max(self._n_slots, slot + 1)

    def match(self, asked: Asked) -> list[int]:
        """Tokens of this prompt believed cached on each slot; at least one is always computed."""
        found = [0] * self._n_slots
        for slot, blocks in self._index.match(asked.request.blocks).items():
            found[slot] = min(blocks * BLOCK_TOKENS, asked.prompt_tokens - 1)
        return found

    def insert(self, slot: int, asked: Asked) -> None:
        self._index.insert(slot, asked.request.blocks)


class Costs:
    """Predicted seconds on each slot; float64[n_slots]."""

    def __init__(self, predictor: Predictor, ledger: Ledger) -> None:
        self._predictor = predictor
        self._ledger = ledger

    def backlog_s(self, now: float) -> Floats:
        """Until what was sent before has its first token."""
        rates = self._predictor.rates(self._ledger.decode_kv)
        return self._ledger.backlog(rates, now).seconds(rates)

    def service_s(self, asked: Asked, cached: list[int]) -> Floats:
        """Of the request itself, from its begin to its first token."""
        rates = self._predictor.rates(self._ledger.decode_kv)
        tokens = asked.prompt_tokens - np.asarray(cached, dtype=np.float64)
        pairs = cost.attention(tokens, np.full(len(cached), float(asked.prompt_tokens)))
        found: Floats = rates.overhead_s + tokens * rates.token_s + pairs * rates.pair_s
        return found


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


class Desk:
    """Endpoints by slot, and the books that the senses show."""

    def __init__(self, *, lease_s: float, prefix_blocks: int = 0, learns: bool = False) -> None:
        """An empty desk.

        Args:
            lease_s: silence after which an endpoint is lost.
            prefix_blocks: how many blocks a slot's prefix table may hold, 0 for none.
            learns: whether the cost model is kept and taught; without, `costs` are the data sheet's.
        """
        self.ledger = Ledger()
        self.predictor = Predictor()
        self.prefixes = Prefixes(prefix_blocks)
        self.beats: list[Beat] = []
        self.names: list[str] = []
        self.account = Account(self.ledger)
        self.scrapes = Scrapes(self.beats)
        self.costs = Costs(self.predictor, self.ledger)
        self._has_prefixes = prefix_blocks > 0
        self._learns = learns
        self._slots: dict[str, int] = {}
        self._seen_at: list[float] = []
        self._lease_s = lease_s
        self._held: dict[str, tuple[int, Asked]] = {}
        self._attempts: dict[str, int] = {}
        self._reclaims: list[Command] = []
        self._usual_tokens = 256.0
        self.first_legs: frozenset[str] = frozenset()
        "Roles of endpoints that new requests are sent to; empty: all."

    def living(self, asked: Asked, now: float, roles: frozenset[str] = frozenset()) -> list[int]:
        """Slots that were heard from within the lease, can hold this prompt, and have one of these roles.

        Args:
            asked: whose prompt.
            now: seconds of the run.
            roles: of the leg in question; empty: those that new requests are sent to.
        """
        return [
            slot
            for slot, seen_at in enumerate(self._seen_at)
            if now - seen_at <= self._lease_s
            and asked.prompt_tokens < self.beats[slot].max_model_len
            and self._has_role(slot, roles or self.first_legs)
        ]

    def takes_first(self) -> Bools:
        """Which slots new requests are sent to."""
        found: Bools = np.array(
            [self._has_role(slot, self.first_legs) for slot in range(len(self.beats))]
        )
        return found

    def _has_role(self, slot: int, roles: frozenset[str]) -> bool:
        return not roles or not roles.isdisjoint(self.beats[slot].roles)

    def asked(self, request_id: str) -> Asked | None:
        """What was sent under this id and has not been answered."""
        held = self._held.get(request_id)
        return None if held is None else held[1]

    def is_heard(self, now: float) -> Bools:
        """Which slots were heard from within the lease."""
        found: Bools = now - np.array(self._seen_at) <= self._lease_s
        return found

    def is_possible(self, asked: Asked) -> bool:
        """Whether any endpoint ever seen could hold this prompt."""
        return any(asked.prompt_tokens < beat.max_model_len for beat in self.beats)

    def send(
        self,
        asked: Asked,
        slot: int,
        now: float,
        predicted_s: float = 0.0,
        *,
        kv_params: bytes = b"",
    ) -> Assign:
        """Enter it in the books and write the command; with `kv_params` it is a decode leg."""
        leg = self._leg(slot, kv_params)
        cached = self.prefixes.match(asked)[slot] if self._has_prefixes else 0
        tokens = float(max(1, asked.prompt_tokens - cached))
        pairs = tokens * (asked.prompt_tokens - 0.5 * tokens)
        answer = asked.request.expected_tokens or self._usual_tokens
        kv = float(asked.prompt_tokens) + (answer if leg != "prefill" else 0.0)
        features = self._features(slot, tokens, pairs, now) if self._learns else ()
        if leg == "decode":
            tokens, pairs, features = 0.0, 0.0, ()
        self.ledger.commit(slot, asked.id, Line(tokens=tokens, pairs=pairs, kv=kv), now)
        if leg == "decode":
            self.ledger.first_token(slot, asked.id, now)
        if self._has_prefixes:
            self.prefixes.insert(slot, asked)
        self._held[asked.id] = (slot, asked)
        self._attempts[asked.id] = self._attempts.get(asked.id, 0) + 1
        return self._command(
            asked,
            slot,
            cached=cached,
            predicted_s=predicted_s,
            features=features,
            leg=leg,
            kv_params=kv_params,
            now=now,
        )

    def _leg(self, slot: int, kv_params: bytes) -> Leg:
        if kv_params:
            return "decode"
        return "prefill" if "prefill" in self.beats[slot].roles else "whole"

    def _features(self, slot: int, tokens: float, pairs: float, now: float) -> tuple[str, ...]:
        """What the predictor is to learn from when the answer has passed."""
        decode_kv = self.ledger.decode_kv
        rates = self.predictor.rates(decode_kv)
        backlog = self.ledger.backlog(rates, now)
        return self.predictor.features(
            slot,
            tokens=tokens + float(backlog.tokens[slot]),
            pairs=pairs + float(backlog.pairs[slot]),
            decode_kv=float(decode_kv[slot]),
            start_s=float(backlog.seconds(rates)[slot]),
        )

    def _command(
        self,
        asked: Asked,
        slot: int,
        *,
        cached: int,
        predicted_s: float,
        features: tuple[str, ...],
        leg: Leg,
        kv_params: bytes,
        now: float,
    ) -> Assign:
        request, beat = asked.request, self.beats[slot]
        deadline_s = request.deadline_s
        job = Job(
            id=asked.id,
            entry=asked.entry,
            attempt=self._attempts[asked.id],
            epoch=beat.epoch,
            leg=leg,
            model=request.model,
            path=request.path,
            enqueued_at=asked.enqueued_at,
            ttft_s=request.ttft_s,
            tpot_s=request.tpot_s,
            deadline_at=None if deadline_s is None else asked.enqueued_at + deadline_s,
            priority=request.priority or 0,
            tenant=request.tenant,
            session=request.session,
            prompt_tokens=asked.prompt_tokens,
            cached_tokens=cached,
            expected_tokens=request.expected_tokens,
            decided_at=now,
            prefill_s=predicted_s,
            features=features,
            kv_params=kv_params,
        )
        decision = Decision(id=asked.id, kind="assigned", at=now, endpoint=beat.endpoint)
        return Assign(endpoint=beat.endpoint, job=job, decision=decision)

    def refuse(self, asked: Asked, reason: str, now: float) -> Finish:
        """Answer it with a rejection."""
        result = Result(
            id=asked.id,
            outcome="rejected",
            reason=reason,
            enqueued_at=asked.enqueued_at,
            finished_at=now,
        )
        return Finish(entry=asked.entry, reply_to="", result=result)

    def hear(self, beat: Beat, now: float) -> list[Asked]:
        """Take in a beat; whoever was lost with an endpoint's former life comes back."""
        slot = self._slots.get(beat.endpoint)
        lost: list[Asked] = []
        if slot is None:
            slot = self._slots[beat.endpoint] = len(self.beats)
            self.beats.append(beat)
            self.names.append(beat.endpoint)
            self._seen_at.append(now)
            self._open(slot, beat)
        elif beat.epoch > self.beats[slot].epoch:
            lost = self.lose(slot, now)
            self._open(slot, beat)
        self.beats[slot] = beat
        self._seen_at[slot] = now
        for report in beat.first_tokens:
            request_id = report.rsplit(":", 2)[0]
            held = self._held.get(request_id)
            if held is not None and held[0] == slot:
                self.ledger.first_token(slot, request_id, now)
        return lost

    def _open(self, slot: int, beat: Beat) -> None:
        self.ledger.open(slot)
        self.predictor.open(slot, beat)
        if self._has_prefixes:
            self.prefixes.open(slot)

    def learn(self, reward: Reward, now: float) -> None:
        """An answer has passed."""
        slot = self._slots[reward.endpoint]
        if self._learns:
            self.predictor.learn(reward, slot)
        if self._held.pop(reward.id, None) is not None:
            self.ledger.release(slot, reward.id, now)
        if reward.outcome in ("prefilled", "returned"):
            return
        self._attempts.pop(reward.id, None)
        self._usual_tokens = round(0.98 * self._usual_tokens + 0.02 * reward.output_tokens)

    def silent(self, now: float) -> list[int]:
        """Slots that hold something and were not heard from within the lease."""
        return [
            slot
            for slot, seen_at in enumerate(self._seen_at)
            if now - seen_at > self._lease_s and self.ledger.seats[slot] > 0
        ]

    def lose(self, slot: int, now: float) -> list[Asked]:
        """Everything that a lost endpoint held, to be sent elsewhere."""
        lost = [asked for held_by, asked in self._held.values() if held_by == slot]
        for asked in lost:
            del self._held[asked.id]
            self.ledger.release(slot, asked.id, now)
            self._reclaims.append(self._reclaim(asked, self.names[slot], now))
        return lost

    def reclaims(self) -> list[Command]:
        """Words that fence what lost endpoints may still say, since they were last asked for."""
        taken, self._reclaims = self._reclaims, []
        return taken

    def _reclaim(self, asked: Asked, endpoint: str, now: float) -> Reclaim:
        attempt = self._attempts[asked.id]
        decision = Decision(id=asked.id, kind="reclaimed", at=now, endpoint=endpoint)
        return Reclaim(
            id=asked.id,
            entry=asked.entry,
            endpoint=endpoint,
            attempt=attempt,
            deadline_at=None,
            decision=decision,
        )

    def lapse_at(self) -> float | None:
        """When the next endpoint that holds something would count as lost."""
        seats = self.ledger.seats
        held = [at for slot, at in enumerate(self._seen_at) if seats[slot] > 0]
        return min(held) + self._lease_s + 1e-3 if held else None


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
                    commands.append(self._desk.refuse(asked, "longer than every context", now))
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
                return desk.refuse(asked, "longer than every context", now)
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
