"""What can be seen of the core from outside: figures for metrics and people, and the state to start warm from."""

from typing import Literal

import msgspec
import numpy as np

from scheduler.book import Book
from scheduler.fairness import Given
from scheduler.learned import Learned
from scheduler.predict import Predictor
from scheduler.state import Endpoint

AT_RISK_MAX = 1000
"How many of the most urgent are looked at for `at_risk`; more would say no more."

Believed = Literal["learned", "prior"]


class EndpointView(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint at this moment, by the core's own account."""

    name: str
    state: str
    "`ready`, `draining`, `drained` (by a person) or `away`."
    epoch: int
    seats: int
    "Assigned and not yet returned or finished."
    seats_max: int
    prefill_tokens: float
    "Uncached tokens handed over whose first token has not been seen."
    kv_tokens: float
    "Prompts and expected answers handed over."
    free_in_s: float
    "Predicted seconds until it could begin something new."
    speed: float
    "Learned: how many times the declared hardware's time it takes; 1: as declared."
    error: float
    "Moving mean of |log(actual / predicted)|; 0 before anything was learned."
    coverage: float
    "The part of recent requests that took no longer than the 90 % bound said; 0 before any."
    believed: Believed = "learned"
    "What plans go by there: what was learned of it, or where that was worse for a while, what it declares."
    switches: int = 0
    "How often it has passed from the one to the other."


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The core at this moment. Cheap to make, never fed back."""

    waiting: int
    "Those who can make it, or have promised nothing."
    set_aside: int
    prefilled: int
    "Between their two legs, where prompts are computed apart."
    assigned: int
    running: int
    at_risk: int
    "Waiting with a promise that falls due within the backlog's seconds."
    oldest_age_s: float
    "Of all who wait; 0: nobody does."
    backlog_s: float
    "Predicted seconds of prefill that wait, spread over the endpoints that take work."
    endpoints: tuple[EndpointView, ...]


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Where one request stands."""

    id: str
    entry: str
    state: str
    attempt: int
    endpoint: str
    due_at: float | None
    "None: nothing promised."


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the core knows, in plain numbers and words."""

    at: float
    policy: str
    requests: tuple[Standing, ...]
    endpoints: tuple[EndpointView, ...]
    learned: Learned
    given: Given = Given()
    "What tenants have been given, where they share."
    drained: tuple[str, ...] = ()
    "Endpoints that people have drained, here or not."


def of(book: Book, predictor: Predictor, now: float) -> View:
    """The figures of this moment; time need not have passed the core's own."""
    held = [t for e in book.fleet.endpoints.values() for t in e.held.values()]
    running = sum(ticket.state == "running" for ticket in held)
    backlog = backlog_s(book, predictor)
    lines = book.lines
    return View(
        waiting=len(lines.waiting),
        set_aside=len(lines.aside),
        prefilled=len(book.legs.prefilled),
        assigned=len(held) - running,
        running=running,
        at_risk=sum(ticket.due_at <= now + backlog for ticket in lines.waiting.head(AT_RISK_MAX)),
        oldest_age_s=now - min(lines.since(), default=now),
        backlog_s=backlog,
        endpoints=_endpoints(book, predictor, now),
    )


def snapshot(
    book: Book,
    predictor: Predictor,
    *,
    learned: Learned,
    policy: str,
    now: float,
    with_requests: bool,
) -> Snapshot:
    """The book and what was learned, as one message."""
    tickets = book.tickets.values() if with_requests else ()
    return Snapshot(
        at=now,
        policy=policy,
        requests=tuple(
            Standing(
                id=ticket.id,
                entry=ticket.entry,
                state=ticket.state,
                attempt=ticket.attempt,
                endpoint=ticket.endpoint,
                due_at=ticket.due_at if np.isfinite(ticket.due_at) else None,
            )
            for ticket in tickets
        ),
        endpoints=_endpoints(book, predictor, now),
        learned=learned,
        given=_given(book),
        drained=tuple(book.fleet.drained),
    )


def _given(book: Book) -> Given:
    """The tenants' accounts without what is charged for those in some worker's hands."""
    tenants = book.lines.by_tenant
    if tenants is None:
        return Given()
    held = [ticket for e in book.fleet.endpoints.values() for ticket in e.held.values()]
    held += book.legs.prefilled
    return tenants.accounts.export([(ticket.request.tenant, ticket.charged) for ticket in held])


def backlog_s(book: Book, predictor: Predictor) -> float:
    """Predicted seconds of prefill that wait, spread over the endpoints that take work; 0 with none."""
    rates = predictor.rates(book.ledger.decode_kv)
    ready = np.isfinite(book.fleet.ready_s)
    if not ready.any():
        return 0.0
    return float(book.lines.tokens / (1.0 / rates.token_s[ready]).sum())


def _endpoints(book: Book, predictor: Predictor, now: float) -> tuple[EndpointView, ...]:
    rates = predictor.rates(book.ledger.decode_kv)
    free_in_s = book.ledger.backlog(rates, now).seconds(rates)
    return tuple(
        EndpointView(
            name=endpoint.name,
            state=_state(endpoint),
            epoch=endpoint.epoch,
            seats=int(book.ledger.seats[slot]),
            seats_max=int(book.fleet.seats_max[slot]),
            prefill_tokens=float(book.ledger.tokens[slot]),
            kv_tokens=float(book.ledger.kv[slot]),
            free_in_s=float(free_in_s[slot]),
            speed=predictor.speed(slot),
            error=predictor.error(slot),
            coverage=predictor.coverage(slot),
            believed="prior" if predictor.guard.distrusted[slot] else "learned",
            switches=predictor.guard.switches[slot],
        )
        for endpoint in book.fleet.endpoints.values()
        for slot in (endpoint.slot,)
    )


def _state(endpoint: Endpoint) -> str:
    return (
        "drained" if endpoint.is_drained and endpoint.beat.state == "ready" else endpoint.beat.state
    )
