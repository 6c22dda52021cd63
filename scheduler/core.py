"""The core: facts in, wishes out, and time only as an argument.

How a request is decided:
    1. `receive(Arrived)`   its promise is made out and it stands in line (`slo`, `order`)
    2. `receive(Beat)`      says what each endpoint can take and what it has begun (`fleet`, `ledger`)
    3. `decide`             plans the most urgent onto the endpoints, in predicted seconds (`plan`, `cost`, `predict`)
    4. `Assign`             only what starts within the commit window leaves; the ledger knows at once (`assign`)
    5. `receive(Reward)`    it is finished or waits again, and the predictor has learned one completion more

Three drivers use it: the live loop, the simulator's heap and the replayer. The same facts at the same times give
the same commands, byte for byte (I5, I6).
"""

import itertools

import msgspec
import numpy as np

from scheduler import assign, intake, ledger, order, view
from scheduler.book import Book
from scheduler.events import Arrived, Command, Event, Recovered, Refused
from scheduler.fleet import Fleet
from scheduler.outbox import Ending, Outbox
from scheduler.plan import Choice, Planner, PlanSettings, Room
from scheduler.policies import AnyPolicy, Policy, Urgency
from scheduler.predict import Predictor
from scheduler.prefix import BLOCK_TOKENS, Index
from scheduler.settings import Objective
from scheduler.state import Endpoint, Floats, Ticket
from scheduler.view import Snapshot, View
from scheduler.wire import Beat, Control, Reward

RETEST_MAX = 32
"How many of those set aside are tested again in one step; the rest keep."

FILL_MAX = 16
"How many of those set aside are offered what is idle in one step."

FORGIVEN_MAX = 16
"""Attempts lost before an engine had them that do not count.

A restarted worker takes all its endpoints' jobs with it, once for each endpoint; a request that kills whoever
takes it, before that can say so, still ends.
"""

TICK_S = 0.01
"The core never asks to be woken sooner: predictions are no finer."


class CoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the core is told once."""

    policy: AnyPolicy | Policy = Urgency()
    "Who goes first."

    objectives: dict[str, Objective] = {}
    "Named promises."

    plan: PlanSettings = PlanSettings()
    "How far the plan looks and how early it binds."

    lease_s: float = 3.0
    "An endpoint not heard from for this long loses what it holds."

    waiting_max: int = 100_000
    "One more is rejected, with a time to come back."

    max_attempts: int = 3
    "How often a request may be tried that does not say."

    unknown_model_grace_s: float = 2.0
    "How long a model that nobody ever served may be waited for while endpoints are alive: a start's first beats."

    step_max: int = 1024
    "The most requests that one step ends because their time ran out (I8)."

    finished_max: int = 100_000
    "Ids of ended requests that are remembered, to know a late duplicate."


class Scheduler:
    """Decides for one pool. Owned by one driver; holds no lock, no clock and no socket."""

    def __init__(self, settings: CoreSettings, rng: np.random.Generator) -> None:
        """Start empty, knowing no endpoint."""
        self.settings = settings
        self._rng = rng
        self._terms = settings.policy.terms
        self._book = Book(settings.finished_max)
        self._outbox = Outbox(settings.policy.label)
        self._predictor = Predictor()
        self._prefixes = Index()
        self._now = float("-inf")
        self._strange: dict[str, float] = {}
        "Models that nobody serves or served, and since when that matters."
        self._lease_at = float("-inf")
        "No lease ends before: hearing from an endpoint only moves its end away, so few steps need look."
        self._reborn: dict[str, Beat] = {}
        "First beats of new lives: what the old ones held is taken back by the next `decide`, not before the"
        "rewards that were read in the same step."
        self._astray: list[tuple[Ticket, Endpoint]] = []
        "Recovered from an endpoint's earlier life: taken back likewise."
        self._unwanted: list[tuple[Ticket, int]] = []
        "Cancelled while held, and at which attempt: aborted likewise."
        self._aside_credit_s = 0.0
        self._room_at: float | None = None

    def receive(self, event: Event, now: float) -> None:
        """Take in a fact. Costs microseconds; what follows from it comes with the next `decide`."""
        self._pass_time(now)
        match event:
            case Arrived():
                self._on_arrived(event)
            case Beat():
                self._on_beat(event)
            case Reward():
                self._on_reward(event)
            case Control():
                self._on_control(event)
            case Refused():
                self._on_refused(event)
            case Recovered():
                self._on_recovered(event)

    def decide(self, now: float) -> list[Command]:
        """What to do now, in this order. Bounded work however many wait (I8)."""
        self._pass_time(now)
        self._take_back_the_lost()
        self._abort_the_cancelled()
        self._end_the_late()
        self._refuse_strange_models()
        self._plan()
        return self._outbox.take()

    def wakeup_at(self) -> float | None:
        """When `decide` could say something new without a new fact; None: not before one."""
        if self._outbox or self._reborn or self._astray or self._unwanted:
            return self._now
        moments = [self._lease_at] if self._fleet.endpoints else []
        moments += [since + self.settings.unknown_model_grace_s for since in self._strange.values()]
        moments += [at for at in (self._book.next_end_at(), self._room_at) if at is not None]
        return max(self._now, min(moments)) if moments else None

    def _pass_time(self, now: float) -> None:
        assert now >= self._now, f"time went back from {self._now!r} to {now!r} (I4)"
        self._now = now

    # Requests

    def _on_arrived(self, event: Arrived) -> None:
        if self._is_known(event):
            return
        newcomer = self._make_ticket(event)
        if newcomer is None:
            return
        ending = intake.obstacle(
            newcomer,
            self._book,
            waiting_max=self.settings.waiting_max,
            backlog_s=self._backlog_s,
            now=self._now,
        )
        if ending is not None:
            self._refuse(event, ending)
            return
        self._book.read(newcomer)
        self._note(newcomer, "read", f"waits as number {len(self._book.lines)}")

    def _on_recovered(self, event: Recovered) -> None:
        """Take over what an earlier leader knew. Its endpoint may not have been heard from yet: it has a lease."""
        # Redis says that it lives, whatever is remembered here: its move was refused, or the dead came back.
        self._book.finished.pop(event.request.id, None)
        if self._is_known(event):
            return
        found = self._make_ticket(event)
        if found is None:
            return
        found.is_cancelled = event.cancelled
        if event.endpoint:
            endpoint = self._fleet.endpoints.get(event.endpoint) or self._expect(event)
            found.attempt = max(1, event.attempt)
            self._book.recover(found, endpoint, ledger.uncached(found), self._now)
            if endpoint.epoch != event.epoch:
                self._astray.append((found, endpoint))
            if event.cancelled:
                self._unwanted.append((found, found.attempt))
            return
        found.attempt = event.attempt
        self._book.read(found)
        self._end_if_over(found)

    def _is_known(self, event: Arrived | Recovered) -> bool:
        """Whether this id lives or has lived; another entry of it is a duplicate, to be forgotten."""
        living = self._book.tickets.get(event.request.id)
        if living is None and event.request.id not in self._book.finished:
            return False
        # The same entry comes twice when a new reader starts a little before the old one's end.
        if living is None or living.entry != event.entry:
            self._outbox.forget(event.request.id, event.entry)
        return True

    def _make_ticket(self, event: Arrived | Recovered) -> Ticket | None:
        made = intake.ticket(
            event,
            objectives=self.settings.objectives,
            policy=self.settings.policy,
            predictor=self._predictor,
            max_attempts=self.settings.max_attempts,
        )
        if isinstance(made, Ticket):
            return made
        self._refuse(event, made)
        return None

    def _refuse(self, event: Arrived | Recovered, ending: Ending) -> None:
        """End a request that never stood in line."""
        self._book.remember(event.request.id, event.entry)
        self._outbox.end(
            event.request, event.entry, event.enqueued_at, ending, attempt=0, now=self._now
        )

    def _finish(self, ticket: Ticket, ending: Ending) -> None:
        """End a request that waits."""
        assert not ticket.is_held, (
            f"request {ticket.id!r} is with {ticket.endpoint}, its worker ends it"
        )
        self._book.finish(ticket, self._now)
        self._outbox.end(
            ticket.request,
            ticket.entry,
            ticket.enqueued_at,
            ending,
            attempt=ticket.attempt,
            now=self._now,
        )

    def _end_if_over(self, ticket: Ticket) -> None:
        """End a request that has just come back and must not be tried again."""
        if ticket.is_cancelled:
            self._finish(ticket, Ending(outcome="cancelled", reason="cancelled by request"))
        elif ticket.is_spent:
            reason = f"lost {ticket.attempt} times with its endpoint, the limit is {ticket.attempts_allowed}"
            self._finish(ticket, Ending(outcome="failed", reason=reason, is_dead=True))

    def _on_refused(self, event: Refused) -> None:
        ticket = self._book.tickets.get(event.id)
        if ticket is not None and ticket.entry == event.entry:
            self._book.finish(ticket, self._now)

    def _on_reward(self, event: Reward) -> None:
        endpoint = self._fleet.endpoints.get(event.endpoint)
        ticket = self._book.tickets.get(event.id)
        if endpoint is not None and endpoint.epoch == event.epoch:
            self._learn(event, endpoint, ticket)
        if ticket is None or ticket.attempt != event.attempt:
            return
        if event.outcome != "returned":
            self._book.finish(ticket, self._now)
        elif ticket.is_held:
            self._book.give_back(ticket, "hand_back", self._now)
            if ticket.is_cancelled:
                self._end_if_over(ticket)

    def _learn(self, reward: Reward, endpoint: Endpoint, ticket: Ticket | None) -> None:
        self._predictor.learn(reward, endpoint.slot)
        if (
            reward.cached_tokens is not None
            and ticket is not None
            and ticket.attempt == reward.attempt
        ):
            self._prefixes.correct(
                endpoint.slot,
                believed_tokens=ticket.cached_tokens,
                cached_tokens=reward.cached_tokens,
            )

    # People

    def _on_control(self, event: Control) -> None:
        if event.action == "cancel":
            self._cancel(event)
            return
        endpoint = self._fleet.endpoints.get(event.endpoint)
        if endpoint is not None:
            self._fleet.drain(endpoint, is_drained=event.action == "drain")

    def _cancel(self, event: Control) -> None:
        ticket = self._book.tickets.get(event.id)
        if ticket is None or ticket.is_cancelled:
            return
        ticket.is_cancelled = True
        if ticket.is_held:
            self._unwanted.append((ticket, ticket.attempt))
        else:
            reason = event.reason or "cancelled by request"
            self._finish(ticket, Ending(outcome="cancelled", reason=reason))

    # Endpoints

    def _on_beat(self, beat: Beat) -> None:
        endpoint = self._fleet.endpoints.get(beat.endpoint)
        if beat.epoch < self._fleet.epochs.get(beat.endpoint, 0):
            return  # a worker that was replaced still talks
        if endpoint is not None and beat.epoch > endpoint.epoch:
            self._reborn[beat.endpoint] = beat
            self._fleet.epochs[beat.endpoint] = beat.epoch
            return
        if endpoint is None:
            self._join(beat)
        else:
            self._fleet.hear(endpoint, beat, self._now)
        self._progress(beat)

    def _progress(self, beat: Beat) -> None:
        """What it began since the last beat. A report about another attempt moves nothing."""
        for report in beat.started:
            ticket = self._reported(beat.endpoint, report, parts=2)
            if ticket is not None:
                self._book.start(ticket)
        for report in beat.first_tokens:
            ticket = self._reported(beat.endpoint, report, parts=3)
            if ticket is not None:
                self._book.first_token(ticket, self._now)

    def _reported(self, endpoint: str, report: str, parts: int) -> Ticket | None:
        """The ticket that `id:attempt` or `id:attempt:milliseconds` speaks of, if this endpoint holds it."""
        words = report.rsplit(":", parts - 1)
        ticket = self._book.tickets.get(words[0])
        if len(words) != parts or ticket is None or ticket.endpoint != endpoint:
            return None
        return ticket if words[1] == str(ticket.attempt) else None

    def _join(self, beat: Beat, *, is_drained: bool = False) -> Endpoint:
        endpoint = self._fleet.join(beat, self._now)
        self._fleet.drain(endpoint, is_drained=is_drained)
        self._book.ledger.open(endpoint.slot)
        self._predictor.open(endpoint.slot, beat)
        self._prefixes.open(endpoint.slot, beat.kv_tokens)
        return endpoint

    def _expect(self, event: Recovered) -> Endpoint:
        """An endpoint known only from what it holds: away until its first beat."""
        beat = Beat(endpoint=event.endpoint, epoch=event.epoch, state="away")
        return self._join(beat)

    def _take_back_the_lost(self) -> None:
        """Give back what nobody works on any more: new lives, ended leases, strays of a recovery."""
        for ticket, endpoint in self._astray:
            if ticket.is_held and ticket.endpoint == endpoint.name:
                self._take_back(ticket, endpoint, f"{endpoint.name} began a new life")
        self._astray.clear()
        for name, beat in self._reborn.items():
            endpoint = self._fleet.endpoints[name]
            self._lose(endpoint, f"{name} began a new life")
            self._join(beat, is_drained=endpoint.is_drained)
        self._reborn.clear()
        if self._lease_at <= self._now:
            self._lose_the_silent()

    def _lose_the_silent(self) -> None:
        lease_s = self.settings.lease_s
        for endpoint in list(self._fleet.endpoints.values()):
            if endpoint.lost_at(lease_s) <= self._now:
                silent_s = self._now - endpoint.seen_at
                self._lose(endpoint, f"{endpoint.name} was last heard {silent_s:.1f} s ago")
        ends = [endpoint.lost_at(lease_s) for endpoint in self._fleet.endpoints.values()]
        self._lease_at = min(ends, default=self._now + lease_s)

    def _abort_the_cancelled(self) -> None:
        for ticket, attempt in self._unwanted:
            if ticket.is_held and ticket.attempt == attempt:
                self._outbox.abort(ticket)
        self._unwanted.clear()

    def _lose(self, endpoint: Endpoint, reason: str) -> None:
        """Take back all it holds, and let it go: it removes itself only, never stalls the pool."""
        for ticket in list(endpoint.held.values()):
            self._take_back(ticket, endpoint, reason)
        self._fleet.leave(endpoint)
        self._predictor.close(endpoint.slot)
        self._prefixes.close(endpoint.slot)

    def _take_back(self, ticket: Ticket, endpoint: Endpoint, reason: str) -> None:
        if ticket.state == "assigned" and ticket.forgiven < FORGIVEN_MAX:
            ticket.forgiven += 1
        self._outbox.reclaim(ticket, endpoint, reason, self._now)
        self._book.give_back(ticket, "reclaim", self._now)
        self._end_if_over(ticket)

    # Deciding

    def _end_the_late(self) -> None:
        for ticket in self._book.ended(self._now, self.settings.step_max):
            ending = intake.out_of_time(ticket, backlog_s=self._backlog_s(), now=self._now)
            self._finish(ticket, ending)

    def _refuse_strange_models(self) -> None:
        """End what asks for a model that nobody serves, once endpoints had their time to say what they serve.

        With no endpoint at all everything waits (scale to zero), and so does a model that was ever served.
        """
        if not self._fleet.endpoints:
            self._strange.clear()
            return
        models = [m for m in self._book.lines.by_model if m not in self._fleet.known_models]
        self._strange = {model: self._strange.get(model, self._now) for model in models}
        for model, since in list(self._strange.items()):
            if since + self.settings.unknown_model_grace_s <= self._now:
                self._refuse_model(model)

    def _refuse_model(self, model: str) -> None:
        ending = intake.unknown_model(model, list(self._fleet.known_models))
        asking = self._book.lines.by_model[model].values()
        for ticket in list(itertools.islice(asking, self.settings.step_max)):
            self._finish(ticket, ending)

    def _plan(self) -> None:
        self._room_at = None
        wanted_s = self._fleet.wanted(self._book.lines.by_model)
        if not np.isfinite(wanted_s).any():
            return
        planner = self._planner(wanted_s)
        self._serve_aged(planner)
        line = self._book.lines.waiting.head(self.settings.plan.horizon)
        planner.serve(self._with_the_hopeful(planner, line))
        self._turn(planner)
        if planner.is_exhausted:
            self._fill(planner)
        for choice in planner.choices:
            self._hand_over(choice)
        if planner.is_cut:
            self._room_at = self._now
        elif self._book.lines:
            is_short = planner.is_exhausted and len(line) == self.settings.plan.horizon
            self._room_at = self._next_room_at(planner.room, is_short=is_short)

    def _planner(self, wanted_s: Floats) -> Planner:
        book, fleet = self._book.ledger, self._fleet
        rates = self._predictor.rates(book.decode_kv)
        room = Room(
            rates=rates,
            backlog=book.backlog(rates, self._now),
            seats=fleet.seats_max - book.seats,
            kv=fleet.kv_max - book.kv,
            kv_max=fleet.kv_max,
            length_max=fleet.length_max,
            wanted_s=wanted_s,
        )
        return Planner(
            room,
            now=self._now,
            settings=self.settings.plan,
            terms=self._terms,
            spread=self._predictor.spread(room.start_s, self._terms.odds_min),
            pricer=self._price,
            rng=self._rng,
        )

    def _price(self, ticket: Ticket) -> tuple[Floats, Floats]:
        """A request's cached tokens on every slot, and where it may go."""
        cached = np.zeros(len(self._fleet.by_slot))
        for slot, blocks in self._prefixes.match(ticket.request.blocks).items():
            cached[slot] = blocks * BLOCK_TOKENS
        return cached, self._fleet.barrier(ticket.request.model)

    def _serve_aged(self, planner: Planner) -> None:
        """The share of those set aside: the oldest goes first while there is credit."""
        if self._aside_credit_s > 0:
            for ticket in self._book.lines.aside_by_age.head(1):
                planner.serve_aged(ticket)
                self._aside_credit_s -= sum(choice.work_s for choice in planner.choices)

    def _with_the_hopeful(self, planner: Planner, line: list[Ticket]) -> list[Ticket]:
        """The line and those set aside that could make it after all, in one order."""
        chosen = {choice.ticket.id for choice in planner.choices}
        hopeful = planner.hopeful(self._book.lines.aside.tail(RETEST_MAX))
        again = [ticket for ticket in hopeful if ticket.id not in chosen]
        return sorted(line + again, key=order.by_rank) if again else line

    def _turn(self, planner: Planner) -> None:
        """Set aside and take up as planned; each change is noted once."""
        for turn in planner.turns:
            slack_s = turn.ticket.due_at - self._now - turn.total_s
            if turn.kind == "take_up":
                self._book.lines.take_up(turn.ticket)
                self._note(turn.ticket, "taken_up", "can make it after all", slack_s)
            else:
                self._book.lines.set_aside(turn.ticket)
                reason = f"cannot make it: {-slack_s:.2f} s too late on the best endpoint"
                self._note(turn.ticket, "set_aside", reason, slack_s)

    def _fill(self, planner: Planner) -> None:
        if not self._book.lines.aside:
            return
        chosen = {choice.ticket.id for choice in planner.choices}
        shortest = self._book.lines.aside_by_size.head(FILL_MAX)
        is_calm = all(t.id in chosen for t in self._book.lines.waiting.head(len(chosen) + 1))
        planner.fill([t for t in shortest if t.id not in chosen], is_calm=is_calm)

    def _hand_over(self, choice: Choice) -> None:
        ticket = choice.ticket
        endpoint = self._fleet.by_slot[choice.slot]
        assert endpoint is not None, f"the plan chose slot {choice.slot}, where nobody is"
        waiting = len(self._book.lines)
        self._book.assign(ticket, endpoint, choice.line, self._now)
        ticket.cached_tokens = choice.cached_tokens
        self._prefixes.insert(choice.slot, ticket.request.blocks)
        self._aside_credit_s = min(
            self.settings.plan.commit_window_s,
            self._aside_credit_s + self._terms.aside_share * choice.work_s,
        )
        features = self._predictor.features(
            choice.slot,
            tokens=choice.line.tokens + choice.ahead_tokens,
            pairs=choice.line.pairs + choice.ahead_pairs,
            decode_kv=float(self._book.ledger.decode_kv[choice.slot]),
            start_s=choice.start_s,
        )
        self._outbox.assign(
            assign.command(
                choice,
                endpoint,
                now=self._now,
                policy=self.settings.policy.label,
                waiting=waiting,
                names=self._fleet.names,
                features=features,
            )
        )

    def _next_room_at(self, room: Room, *, is_short: bool) -> float | None:
        """When an endpoint comes within the window, or falls idle, for those who still wait.

        Args:
            room: what this step has left.
            is_short: all of the horizon was placed, and there may be room for those behind it.
        """
        if is_short:
            return self._now + TICK_S
        wanted_s = self.settings.plan.commit_window_s if self._book.lines.waiting else 0.0
        open_s = room.busy_s[np.isfinite(room.shut_s)]
        ahead_s = open_s[open_s > wanted_s]
        if not len(ahead_s):
            return None
        return self._now + max(TICK_S, float(ahead_s.min()) - wanted_s)

    # What can be seen

    def view(self, now: float) -> View:
        """Figures for metrics and people at this moment; changes nothing."""
        return view.of(self._book, self._predictor, now)

    def snapshot(self) -> Snapshot:
        """Everything, in plain numbers and words."""
        learned = self._predictor.export(tuple(self._fleet.known_models))
        return view.snapshot(
            self._book,
            self._predictor,
            learned=learned,
            policy=self.settings.policy.label,
            now=self._now,
        )

    def restore(self, snapshot: Snapshot) -> bool:
        """Start warm from what another leader learned; False: it was unusable and the start stays cold.

        Only the learned part is taken. Who waits and who runs is told by `Recovered`, from the streams.
        """
        if not self._predictor.restore(snapshot.learned):
            return False
        self._fleet.known_models.update(dict.fromkeys(snapshot.learned.models))
        return True

    def _backlog_s(self) -> float:
        return view.backlog_s(self._book, self._predictor)

    def _note(self, ticket: Ticket, kind: str, reason: str, slack_s: float | None = None) -> None:
        self._outbox.note(
            ticket.id,
            kind,
            reason,
            self._now,
            attempt=ticket.attempt,
            slack_s=slack_s,
            waiting=len(self._book.lines),
        )

    @property
    def _fleet(self) -> Fleet:
        return self._book.fleet
