"""One step: make a plan for who waits, and carry out in the book what the plan chose."""

from collections.abc import Collection

import numpy as np
from msgspec import structs

from scheduler import assign
from scheduler.demand import Demands
from scheduler.fleet import Eligible
from scheduler.memory import Memory
from scheduler.onward import Onward
from scheduler.plan import Choice
from scheduler.planner import Planner
from scheduler.price import Usual
from scheduler.profile.casting import Assembly, Casting
from scheduler.room import Decodes, Room
from scheduler.state import Floats, Ticket
from scheduler.work import Offer, Works

RETEST_MAX = 8
"How many of those set aside are tested again in one step; the rest keep."

PARTS_MAX = 4
"The most horizons in one step; the next one is planned only where all of those before it were handed over."

FILL_MAX = 16
"How many of those set aside are offered what is idle in one step."

PREFILLED_MAX = 64
"Of those who wait between two legs, the most looked at in one step (I8)."

PACE_TICK_S = 0.05
"How often requests between two legs that wait for a better pace are tried again without a new event."

TICK_S = 0.01
"The least time after which a step asks for another: predictions are no finer."


class Planning:
    """A step is planned in four parts.

    0. Where prompts are computed apart, requests whose prompt is computed are bound to endpoints that decode.
    1. The request set aside longest has its share.
    2. The line is served, with those set aside who could make it after all.
    3. Requests that the plan set aside or took up are moved in the book.
    4. Idle endpoints are filled from those set aside, and all that was chosen is handed over.
    """

    def __init__(self, memory: Memory, rng: np.random.Generator) -> None:
        """Plan for what is in this memory; `rng` decides between equals."""
        self._memory = memory
        self._book = memory.book
        self._fleet = memory.book.fleet
        self._settings = memory.settings.plan
        self._terms = memory.settings.policy.terms
        self._label = memory.settings.policy.label
        self._rng = rng
        profile = memory.settings.profile
        self._assembly = None if profile is None else Assembly(profile)
        self._usual = Usual()
        self._demands = Demands()
        self._works = Works(memory.prefixes, memory.sessions, self._fleet.by_slot)
        self._room: Room | None = None
        "The last step's, until it is settled."
        self._unsettled: list[tuple[Choice, tuple[float, float]]] = []
        "What was handed over, with its endpoint's sequences and the KV tokens they read at that moment."
        self._aside_credit_s = 0.0
        self._for_pace: list[Ticket] = []
        self._room_at: float | None = None
        self._rested_at: float | None = None

    def moments(self) -> list[float]:
        """When an endpoint comes within the window, or has rested, for those who still wait."""
        return [at for at in (self._room_at, self._rested_at) if at is not None]

    def step(self) -> None:
        """Hand over what starts within the commit window."""
        self._room_at = self._rested_at = None
        lines, between = self._book.lines, self._book.legs.prefilled
        prefilled = between.head(PREFILLED_MAX) if between else []
        # Every request that waits stands in `by_model`.
        if not self._fleet.by_slot or not (lines.by_model or prefilled):
            return
        eligible = self._without_resting(self._fleet.eligible(self._asked(prefilled)))
        if not eligible.count:
            return
        lines.pass_time(self._memory.now)
        planner = self._planner(eligible)
        if planner.onward is not None:
            self._serve_prefilled(planner, planner.onward, prefilled)
        self._serve_aged(planner)
        line = self._serve_line(planner)
        self._note(planner)
        if lines.aside and not planner.is_cut and planner.has_idle():
            self._fill(planner)
        for choice in planner.choices:
            self._hand_over(choice)
        if planner.is_cut:
            self._room_at = self._memory.now
        elif lines.by_model:
            is_short = planner.is_exhausted and len(line) == self._settings.horizon
            self._room_at = self._next_room_at(planner.room, is_short=is_short)
        if planner.waits_until_at < np.inf:
            self._room_at = min(planner.waits_until_at, self._room_at or np.inf)
        if between:
            self._room_at = min(self._memory.now + PACE_TICK_S, self._room_at or np.inf)

    def settle(self) -> None:
        """Record what the last step handed over, which no worker need wait for. Must come before time passes."""
        memory, room, self._room = self._memory, self._room, None
        if room is not None:
            memory.token_s = room.mean(room.rates.token_s)
        for choice, load in self._unsettled:
            ticket, slot = choice.ticket, choice.slot
            ticket.cached_tokens = choice.cached_tokens
            self._works.forget(ticket.id)
            self._usual.learn(choice.work_s, ticket.prompt_tokens)
            if choice.leg != "decode" and choice.total_s <= ticket.due_at - memory.now:
                self._demand(ticket, choice.work_s, choice.total_s - choice.start_s)
            memory.predictor.pace.prefill(slot, choice.work_s, memory.now)
            ticket.pace = memory.predictor.pace.row(slot, *load, memory.now)
            memory.prefixes.insert(slot, ticket.request.blocks)
            self._join_session(ticket, slot)
            self._aside_credit_s = min(
                self._settings.commit_window_s,
                self._aside_credit_s + self._terms.aside_share * choice.work_s,
            )
        self._unsettled.clear()

    def _serve_line(self, planner: Planner) -> list[Ticket]:
        """Serve the line a horizon at a time, as long as all of it can go; the last part looked at."""
        waiting, horizon = self._book.lines.waiting, self._settings.horizon
        line = waiting.head(horizon)
        planner.serve(self._with_the_hopeful(planner, line))
        for start in range(horizon, PARTS_MAX * horizon, horizon):
            if len(planner.choices) < start or len(line) < horizon:
                break
            line = waiting.head(start + horizon)[start:]
            planner.serve(line)
        return line

    def _asked(self, prefilled: list[Ticket]) -> Collection[str]:
        """The models that those who wait ask for."""
        waiting = self._book.lines.by_model
        if not prefilled:
            return waiting
        return dict.fromkeys([*waiting, *[ticket.request.model for ticket in prefilled]])

    def _without_resting(self, eligible: Eligible) -> Eligible:
        """The same, but nothing new for endpoints that have just handed something back."""
        if not self._fleet.resting:
            return eligible
        barrier_s = eligible.barrier_s.copy()
        now, by_slot = self._memory.now, self._fleet.by_slot
        resting = [e for e in self._fleet.resting if e.rests_until > now and by_slot[e.slot] is e]
        self._fleet.resting = resting
        for endpoint in resting:
            if barrier_s[endpoint.slot] == 0:
                barrier_s[endpoint.slot] = np.inf
                self._rested_at = min(endpoint.rests_until, self._rested_at or np.inf)
        return Eligible.by(barrier_s)

    def _planner(self, eligible: Eligible) -> Planner:
        ledger, fleet, now = self._book.ledger, self._fleet, self._memory.now
        rates = self._memory.predictor.rates(ledger.decode_kv)
        # Answers longer than expected take more than the ledger gave away: then the engine knows better what is left,
        # but for what has come since.
        coming = ledger.read_kv - ledger.decode_kv
        kv_given = np.maximum(ledger.kv, fleet.kv_used + coming)
        room = Room(
            rates=rates,
            backlog=ledger.backlog(rates, now),
            seats=fleet.seats_max - ledger.seats,
            kv=fleet.kv_max - kv_given,
            capacities=fleet.capacities,
            pins=ledger.pins,
            decodes=Decodes(
                lambda: self._memory.predictor.pace.load(ledger.seats, ledger.read_kv, now),
                tightest_s=ledger.tightest_s,
                promised=ledger.promised,
                is_bound=ledger.bound > 0,
            ),
            eligible=eligible,
            answer_part=self._settings.answer_part,
            unbegun=lambda step_s: ledger.unbegun(step_s, now),
        )
        if self._settings.explore > 0:
            room.probe(self._memory.predictor.is_new(), ledger.seats > 0)
        self._room = room
        onward = None
        if fleet.prefilling:
            legs, predictor = self._book.legs, self._memory.predictor
            onward = Onward(
                room,
                fleet,
                legs,
                predictor.transfer,
                step_s=room.decodes.load.joined_s,
                batch=ledger.seats,
                now=now,
            )
        tenants = self._book.lines.by_tenant
        casting = None
        if self._assembly is not None:
            casting = Casting(
                self._assembly,
                room,
                by_slot=fleet.by_slot,
                seats_max=fleet.seats_max,
                decoding=np.array([float(len(lines)) for lines in ledger.decoding]),
                now=now,
            )
        return Planner(
            room,
            now=now,
            settings=self._settings,
            terms=self._terms,
            odds=self._memory.predictor.odds,
            usual=self._usual,
            work=self._works.of,
            barrier=fleet.barrier,
            noise=self._memory.predictor.pace.noise,
            broken=self._broken,
            rng=self._rng,
            standing=None if tenants is None else tenants.accounts.standing,
            casting=casting,
            onward=onward,
        )

    def _broken(self, offer: Offer) -> Floats:
        """By slot, how many requests to come one that is late would make late.

        A prompt longer than usual counts as a usual one: else it might never be served.
        """
        memory = self._memory
        return self._demands.broken(
            offer, self._usual.work_s, memory.predictor.declared_s, memory.now
        )

    def _demand(self, ticket: Ticket, work_s: float, alone_s: float) -> None:
        """Count a request, handed over in time or set aside, as one that a free endpoint would have served in time."""
        spare_s = ticket.due_at - ticket.enqueued_at - alone_s
        if 0 <= spare_s < np.inf:
            self._demands.add(ticket.request.model, work_s, spare_s, self._memory.now)

    def _serve_prefilled(self, planner: Planner, onward: Onward, prefilled: list[Ticket]) -> None:
        """Bind the decode legs, and then keep the places pledged to requests whose prompts are being computed."""
        legs = self._book.legs
        for ticket in prefilled:
            kept = legs.kept[ticket.id]
            planner.decode(ticket, kept, self._fleet.endpoints[kept.endpoint].slot)
        onward.hold(legs)

    def _serve_aged(self, planner: Planner) -> None:
        """The share of those set aside: the oldest goes first while there is credit."""
        if self._aside_credit_s > 0:
            for ticket in self._book.lines.aside_by_age.head(1):
                planner.serve_aged(ticket)
                self._aside_credit_s -= sum(choice.work_s for choice in planner.choices)

    def _with_the_hopeful(self, planner: Planner, line: list[Ticket]) -> list[Ticket]:
        """The line and those set aside that could make it after all, in one order."""
        if not self._book.lines.aside:
            return line
        chosen = {choice.ticket.id for choice in planner.choices}
        hopeful = planner.hopeful(self._book.lines.aside.tail(RETEST_MAX))
        again = [ticket for ticket in hopeful if ticket.id not in chosen]
        return self._book.lines.waiting.joined(line, again) if again else line

    def _note(self, planner: Planner) -> None:
        """Set aside and take up, and mark who waits for a better pace: they do not count as work that waits."""
        if not planner.has_tried:
            return
        self._move_aside(planner)
        for ticket in self._for_pace:
            ticket.waits_for_pace = False
        self._for_pace = planner.for_pace
        for ticket in self._for_pace:
            ticket.waits_for_pace = True

    def _move_aside(self, planner: Planner) -> None:
        """Set aside and take up as planned; each change is noted once."""
        lines, memory = self._book.lines, self._memory
        for aside in planner.asides:
            slack_s = aside.ticket.due_at - memory.now - aside.total_s
            if aside.kind == "take_up":
                lines.take_up(aside.ticket)
                memory.note(aside.ticket, "taken_up", "can make it after all", slack_s)
            else:
                lines.set_aside(aside.ticket)
                self._demand(aside.ticket, aside.alone_s, aside.alone_s)
                reason = f"cannot make it: {-slack_s:.2f} s too late on the best endpoint"
                memory.note(aside.ticket, "set_aside", reason, slack_s)

    def _fill(self, planner: Planner) -> None:
        lines = self._book.lines
        chosen = {choice.ticket.id for choice in planner.choices}
        shortest = lines.aside_by_size.head(FILL_MAX)
        is_calm = all(t.id in chosen for t in lines.waiting.head(len(chosen) + 1))
        planner.fill([t for t in shortest if t.id not in chosen], is_calm=is_calm)

    def _hand_over(self, choice: Choice) -> None:
        memory, ticket = self._memory, choice.ticket
        endpoint = self._fleet.by_slot[choice.slot]
        assert endpoint is not None, f"the plan chose slot {choice.slot}, where nobody is"
        waiting = len(self._book.lines)
        legs = self._book.legs
        kept = legs.kept[ticket.id] if choice.leg == "decode" else None
        line = choice.line
        if endpoint.beat.no_prefix_cache:  # each has its own KV there, however alike they begin
            line = structs.replace(line, blocks=())
        self._book.assign(ticket, endpoint, line, memory.now, choice.leg)
        if choice.pledge is not None:
            legs.pledges[ticket.id] = choice.pledge
        self._unsettled.append((choice, self._book.ledger.load(choice.slot)))
        features = choice.features or memory.predictor.features(
            choice.slot,
            tokens=choice.line.tokens + choice.ahead_tokens,
            pairs=choice.line.pairs + choice.ahead_pairs,
            decode_kv=self._book.ledger.decode_kv.item(choice.slot),
            start_s=choice.start_s,
        )
        ticket.features, ticket.predicted_s = features, choice.total_s - choice.onward_s
        memory.outbox.assign(
            assign.command(
                choice,
                endpoint,
                now=memory.now,
                policy=self._label,
                waiting=waiting,
                names=self._fleet.names,
                features=features,
                kept=kept,
            )
        )

    def _join_session(self, ticket: Ticket, slot: int) -> None:
        """Remember where a session's request without blocks went: its next one is recognised by the session."""
        sessions, session = self._memory.sessions, ticket.request.session
        if session and not ticket.request.blocks:
            ticket.session_tokens = sessions.expected(slot, session, ticket.prompt_tokens)
            sessions.insert(slot, session, ticket.prompt_tokens)

    def _next_room_at(self, room: Room, *, is_short: bool) -> float | None:
        """When an endpoint comes within the window, or falls idle, for those who still wait.

        Args:
            room: what this step has left.
            is_short: all of the horizon was looked at, and there may be room for those behind it, or soon a pace for
                those who wait for one.
        """
        now = self._memory.now
        if is_short:
            return now + TICK_S
        wanted_s = self._settings.commit_window_s if self._book.lines.waiting else 0.0
        busy_s = room.busy_s
        ahead_s = busy_s[(busy_s > wanted_s) & (room.open_s < np.inf)]
        if not len(ahead_s):
            return None
        return now + max(TICK_S, ahead_s.item(ahead_s.argmin()) - wanted_s)
