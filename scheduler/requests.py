"""Events about requests (arrived, recovered, cancelled, refused), and the end of those that no worker holds."""

import itertools

from scheduler import intake
from scheduler.events import Arrived, Recovered, Refused
from scheduler.memory import Memory
from scheduler.outbox import Ending
from scheduler.state import Ticket
from scheduler.wire.client import Control


class Requests:
    """The door in and the door out; between them a request is in the book."""

    def __init__(self, memory: Memory) -> None:
        """Keep accounts in this memory."""
        self._memory = memory
        self._unwanted: list[tuple[Ticket, int]] = []
        "Cancelled while held, and at which attempt: aborted by the next `decide`."
        self._strange: dict[str, float] = {}
        "Models that no endpoint serves or ever served, and since when they are waited for."
        self._unmeasured: dict[str, dict[str, Ticket]] = {}
        "By model: requests that came before any endpoint said how long a prompt may be."
        self._served_since: dict[str, float] = {}
        "The same models, and since when an endpoint has said it."

    @property
    def has_news(self) -> bool:
        """Whether the next `decide` has something to say about what was told."""
        return bool(self._unwanted)

    def moments(self) -> list[float]:
        """When the grace for a model that is not known yet, or not well, ends."""
        grace_s = self._memory.settings.unknown_model_grace_s
        begun = (*self._strange.values(), *self._served_since.values())
        return [since + grace_s for since in begun]

    # In

    def arrived(self, event: Arrived) -> None:
        """Let it stand in line, or say why not."""
        memory = self._memory
        if self._is_known(event):
            return
        newcomer = self._make_ticket(event)
        if newcomer is None:
            return
        ending = self._obstacle(newcomer)
        if ending is not None and ending.outcome == "rejected" and self._sheds_for(newcomer):
            ending = self._obstacle(newcomer)
        if ending is not None:
            self._refuse(event, ending)
            return
        memory.book.read(newcomer)
        self._measure(newcomer)
        memory.outbox.read(newcomer, len(memory.book.lines), memory.now)

    def _obstacle(self, newcomer: Ticket) -> Ending | None:
        memory = self._memory
        return intake.obstacle(
            newcomer,
            memory.book,
            waiting_max=memory.settings.waiting_max,
            backlog_s=memory.backlog_s,
            now=memory.now,
        )

    def _sheds_for(self, newcomer: Ticket) -> bool:
        """Let one in a full line make room for it; False: there is none.

        The latest of those who may be shed goes for one that may not; where tenants share, the latest of the longest line.
        Who has come back from an endpoint that was lost keeps his arrival, and is not the latest.
        """
        lines = self._memory.book.lines
        if newcomer.promise.priority >= 0 and lines.sheddable:
            [shed] = lines.sheddable.tail(1)
            whose = f"at priority {shed.promise.priority} for one of 0 or more"
        elif lines.longest is not None and (last := lines.longest.last(newcomer.request.tenant)):
            shed, whose = (
                last,
                f"as the last of tenant {last.request.tenant!r}, whose line is the longest",
            )
        else:
            return False
        self.finish(shed, intake.shed(whose, len(lines), backlog_s=self._memory.backlog_s()))
        return True

    def recovered(self, event: Recovered) -> Ticket | None:
        """Take over what an earlier leader knew; what an endpoint holds, or keeps KV of, is returned, to be put there."""
        # Redis says that it lives, whatever is remembered here: its move was refused, the dead came back, or Redis lost
        # the entry under which it lived and its client sent it again.
        living = self._memory.book.tickets.get(event.request.id)
        if living is not None and living.entry != event.entry:
            self._forget(living)
        self._memory.book.finished.pop(event.request.id, None)
        if self._is_known(event):
            return None
        found = self._make_ticket(event)
        if found is None:
            return None
        found.is_cancelled = event.cancelled
        found.attempt, found.leg, found.handovers = event.attempt, event.leg, event.handovers
        if event.endpoint or event.prefilled is not None:
            return found
        self.wait(found)
        return None

    def wait(self, recovered: Ticket) -> None:
        """It stands in line again, unless that is over."""
        self._memory.book.read(recovered)
        self._measure(recovered)
        self.end_if_over(recovered)

    def refused(self, event: Refused) -> None:
        """Redis knows better: forget it."""
        ticket = self._memory.book.tickets.get(event.id)
        if ticket is not None and ticket.entry == event.entry:
            self._forget(ticket)

    def cancel(self, event: Control) -> None:
        """End it where it waits; where a worker holds it, that one is asked to."""
        ticket = self._memory.book.tickets.get(event.id)
        if ticket is None or ticket.is_cancelled:
            return
        ticket.is_cancelled = True
        if ticket.is_held:
            self.abort_later(ticket)
        else:
            reason = event.reason or "cancelled by request"
            self.finish(ticket, Ending(outcome="cancelled", reason=reason))

    def abort_later(self, ticket: Ticket) -> None:
        """Nobody wants this attempt any more."""
        self._unwanted.append((ticket, ticket.attempt))

    # Out

    def finish(self, ticket: Ticket, ending: Ending) -> None:
        """End a request that waits."""
        assert not ticket.is_held, (
            f"request {ticket.id!r} is with {ticket.endpoint}, its worker ends it"
        )
        self._forget(ticket)
        self._memory.outbox.end(
            ticket.request,
            ticket.entry,
            ticket.enqueued_at,
            ending,
            attempt=ticket.attempt,
            now=self._memory.now,
        )

    def end_if_over(self, ticket: Ticket) -> None:
        """End a request that has just come back and must not be tried again."""
        if ticket.is_cancelled:
            self.finish(ticket, Ending(outcome="cancelled", reason="cancelled by request"))
        elif ticket.is_spent:
            reason = f"lost {ticket.attempt} times with its endpoint, the limit is {ticket.attempts_allowed}"
            self.finish(ticket, Ending(outcome="failed", reason=reason, is_dead=True))

    def abort_the_cancelled(self) -> None:
        """Ask the workers to end what was cancelled while they hold it."""
        for ticket, attempt in self._unwanted:
            if ticket.is_held and ticket.attempt == attempt:
                self._memory.outbox.abort(ticket)
        self._unwanted.clear()

    def end_the_late(self) -> None:
        """End those whose deadline, or longest queue, has passed."""
        memory = self._memory
        for ticket in memory.book.ended(memory.now, memory.settings.step_max):
            memory.book.lines.settle(ticket, is_kept=False)
            ending = intake.out_of_time(ticket, backlog_s=memory.backlog_s(), now=memory.now)
            self.finish(ticket, ending)

    def refuse_strange_models(self) -> None:
        """End what asks for a model that nobody serves, once endpoints had their time to say what they serve.

        With no endpoint at all everything waits (scale to zero), and so does a model that was ever served.
        """
        fleet, lines, now = self._memory.book.fleet, self._memory.book.lines, self._memory.now
        if not fleet.endpoints:
            self._strange.clear()
            return
        models = [model for model in lines.by_model if model not in fleet.known_models]
        if not models and not self._strange:
            return
        self._strange = {model: self._strange.get(model, now) for model in models}
        for model, since in list(self._strange.items()):
            if since + self._memory.settings.unknown_model_grace_s <= now:
                self._refuse_model(model)

    def refuse_the_too_long(self) -> None:
        """End what came before its model's endpoints and is longer than any of them serves; shorten what only looks so."""
        if not self._unmeasured:
            return
        book, now = self._memory.book, self._memory.now
        served = [model for model in self._unmeasured if book.fleet.longest(model) is not None]
        self._served_since = {model: self._served_since.get(model, now) for model in served}
        for model, since in list(self._served_since.items()):
            if since + self._memory.settings.unknown_model_grace_s <= now:
                self._refuse_long(model)

    def _refuse_long(self, model: str) -> None:
        book, early = self._memory.book, self._unmeasured[model]
        for ticket in list(itertools.islice(early.values(), self._memory.settings.step_max)):
            del early[ticket.id]
            if ticket.state not in ("waiting", "set_aside"):
                continue
            ending = intake.too_long(ticket, book)
            if ending is not None:
                self.finish(ticket, ending)
            else:
                book.lines.resize(ticket, intake.believed(ticket, book))
        if not early:
            del self._unmeasured[model], self._served_since[model]

    def _measure(self, newcomer: Ticket) -> None:
        """Remember it where no endpoint has said yet how long a prompt may be."""
        model = newcomer.request.model
        if self._memory.book.fleet.longest(model) is None:
            self._unmeasured.setdefault(model, {})[newcomer.id] = newcomer

    def _refuse_model(self, model: str) -> None:
        book = self._memory.book
        ending = intake.unknown_model(model, list(book.fleet.known_models))
        asking = book.lines.by_model[model].values()
        for ticket in list(itertools.islice(asking, self._memory.settings.step_max)):
            self.finish(ticket, ending)

    def _forget(self, ticket: Ticket) -> None:
        self._memory.book.finish(ticket, self._memory.now)
        self._unmeasured.get(ticket.request.model, {}).pop(ticket.id, None)

    def _is_known(self, event: Arrived | Recovered) -> bool:
        """Whether this id lives or has lived; another entry of it is a duplicate, to be forgotten."""
        book = self._memory.book
        living = book.tickets.get(event.request.id)
        if living is None and event.request.id not in book.finished:
            return False
        # The same entry comes twice when a new reader starts a little before the old one's end.
        if living is None or living.entry != event.entry:
            self._memory.outbox.forget(event.request.id, event.entry)
        return True

    def _make_ticket(self, event: Arrived | Recovered) -> Ticket | None:
        settings = self._memory.settings
        made = intake.ticket(
            event,
            objectives=settings.objectives,
            policy=settings.policy,
            predictor=self._memory.predictor,
            token_s=self._memory.token_s,
            max_attempts=settings.max_attempts,
        )
        if isinstance(made, Ticket):
            made.prompt_tokens = intake.believed(made, self._memory.book)
            return made
        self._refuse(event, made)
        return None

    def _refuse(self, event: Arrived | Recovered, ending: Ending) -> None:
        """End a request that never stood in line."""
        self._memory.book.remember(event.request.id)
        self._memory.outbox.end(
            event.request,
            event.entry,
            event.enqueued_at,
            ending,
            attempt=0,
            now=self._memory.now,
        )
