"""Where every living request stands, in one place, so that no account can disagree with another.

A request is in exactly one of four places: in the lines (it waits), with an endpoint (and then in the ledger),
between two legs (`legs`), or gone. Each move below is one transition of the lifecycle and changes all accounts together (I1).
"""

import heapq

from scheduler.fairness import Accounts, FairnessSettings
from scheduler.fleet import Fleet
from scheduler.ledger import Ledger, Line
from scheduler.legs import Legs
from scheduler.lifecycle import Transition
from scheduler.order import Lines
from scheduler.state import Endpoint, Kept, Ticket
from scheduler.wire.words import Leg

ENDS_MIN = 1_000
"Up to twice so many moments nothing is dropped."


_HALFWAY: tuple[Transition, ...] = ("read", "assign", "hand_over")
"How a request comes to stand between two legs."


class Book:
    """Tickets, lines, fleet and ledger: the core's whole memory of the present."""

    def __init__(self, finished_max: int, fairness: FairnessSettings) -> None:
        """Remember the last `finished_max` ids that ended, to know a late duplicate."""
        self.tickets: dict[str, Ticket] = {}
        self.lines = Lines(Accounts(fairness) if fairness.quantum_tokens else None)
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.legs = Legs()
        self.finished: dict[str, None] = {}
        self._finished_max = finished_max
        self._ends: list[tuple[float, str]] = []
        "A heap of the moments when somebody may wait no longer; those who have left are dropped in bulk."

    def read(self, ticket: Ticket) -> None:
        """A request is here and waits."""
        assert ticket.id not in self.tickets, f"request {ticket.id!r} lives already"
        ticket.transition("read")
        self.tickets[ticket.id] = ticket
        self._wait(ticket)

    def assign(
        self, ticket: Ticket, endpoint: Endpoint, line: Line, now: float, leg: Leg = "whole"
    ) -> None:
        """An endpoint is to have it: the account is made in the step of the choice."""
        if ticket.state == "prefilled":
            self.legs.bind(ticket, endpoint.name)
        else:
            self.lines.remove(ticket)
        ticket.transition("assign")
        ticket.attempt += 1
        ticket.leg = leg
        self._hold(ticket, endpoint, line, now)
        if leg == "decode":  # no prefill of others waits behind it
            self.ledger.first_token(endpoint.slot, ticket.id, now)

    def recover(self, ticket: Ticket, endpoint: Endpoint, line: Line, now: float) -> None:
        """It was assigned by an earlier leader, and its attempt counts as it stands."""
        assert ticket.id not in self.tickets, f"request {ticket.id!r} lives already"
        ticket.transition("read")
        ticket.transition("assign")
        self.tickets[ticket.id] = ticket
        self._hold(ticket, endpoint, line, now)
        if ticket.leg == "decode":
            self.ledger.first_token(endpoint.slot, ticket.id, now)

    def resume(self, ticket: Ticket, kept: Kept) -> None:
        """It stood between two legs under an earlier leader."""
        assert ticket.id not in self.tickets, f"request {ticket.id!r} lives already"
        for transition in _HALFWAY:
            ticket.transition(transition)
        self.tickets[ticket.id] = ticket
        self._wait_halfway(ticket, kept)

    def start(self, ticket: Ticket) -> None:
        """Its engine has it. Said twice, it does no harm."""
        if ticket.state == "assigned":
            ticket.transition("start")

    def first_token(self, ticket: Ticket, now: float) -> None:
        """Its prefill is done."""
        self.start(ticket)
        self.ledger.first_token(self._slot(ticket), ticket.id, now)
        if ticket.leg == "decode":
            self.legs.fetched(ticket.id)

    def hand_over(self, ticket: Ticket, kept: Kept, now: float) -> None:
        """Its prompt is computed, and its KV waits for whoever decodes it."""
        self._let_go(ticket, now)
        ticket.transition("hand_over")
        ticket.handovers += 1
        self._wait_halfway(ticket, kept)

    def lose_kv(self, ticket: Ticket) -> None:
        """Its KV is gone before anybody was to fetch it: it waits as it did at its beginning."""
        self.legs.leave(ticket)
        self.lines.charge(ticket, 0, 0)
        ticket.transition("lose")
        self._wait(ticket)

    def give_back(self, ticket: Ticket, transition: Transition, now: float) -> None:
        """It waits again, with its original arrival."""
        self._let_go(ticket, now)
        self.legs.forget(ticket.id)
        self.lines.charge(ticket, 0, 0)
        ticket.transition(transition)
        self._wait(ticket)

    def finish(self, ticket: Ticket, now: float) -> None:
        """It has its terminal record and is remembered only by id."""
        if ticket.is_held:
            self._let_go(ticket, now)
            self.legs.forget(ticket.id)
        elif ticket.state == "prefilled":
            self.legs.leave(ticket)
        else:
            self.lines.remove(ticket)
        ticket.transition("finish")
        del self.tickets[ticket.id]
        self.remember(ticket.id)

    def remember(self, request_id: str) -> None:
        """This id has ended; a later entry of it is a duplicate."""
        self.finished[request_id] = None
        if len(self.finished) > self._finished_max:
            del self.finished[next(iter(self.finished))]

    def ended(self, now: float, limit: int) -> list[Ticket]:
        """At most `limit` waiting requests whose time has run out, in the order in which it did."""
        found: dict[str, Ticket] = {}
        while self._ends and self._ends[0][0] <= now and len(found) < limit:
            _, request_id = heapq.heappop(self._ends)
            ticket = self.tickets.get(request_id)
            if ticket is not None and not ticket.is_held and _end(ticket) <= now:
                found[request_id] = ticket
        return list(found.values())

    def next_end_at(self) -> float | None:
        """When the next one may run out of time; early is possible, late is not."""
        return self._ends[0][0] if self._ends else None

    def _wait(self, ticket: Ticket) -> None:
        self.lines.add(ticket)
        self._watch_end(ticket)

    def _wait_halfway(self, ticket: Ticket, kept: Kept) -> None:
        self.legs.wait(ticket, kept)
        self.lines.charge(ticket, ticket.computed_tokens, ticket.output_tokens)
        self._watch_end(ticket)

    def _watch_end(self, ticket: Ticket) -> None:
        end_at = _end(ticket)
        if end_at < float("inf"):
            heapq.heappush(self._ends, (end_at, ticket.id))
            if len(self._ends) > 2 * max(ENDS_MIN, len(self.tickets)):
                self._drop_ends()

    def _drop_ends(self) -> None:
        """Forget the moments of those who wait no longer: most leave long before theirs."""
        waiting = [ticket for ticket in self.tickets.values() if not ticket.is_held]
        ends = [(_end(ticket), ticket.id) for ticket in waiting]
        self._ends = [end for end in ends if end[0] < float("inf")]
        heapq.heapify(self._ends)

    def _hold(self, ticket: Ticket, endpoint: Endpoint, line: Line, now: float) -> None:
        ticket.endpoint = endpoint.name
        ticket.handed_at, ticket.missed_at = now, None
        endpoint.held[ticket.id] = ticket
        self.ledger.commit(endpoint.slot, ticket.id, line, now)
        computed = ticket.computed_tokens if ticket.leg == "decode" else line.tokens
        self.lines.charge(ticket, computed, ticket.output_tokens)

    def _let_go(self, ticket: Ticket, now: float) -> None:
        self.ledger.release(self._slot(ticket), ticket.id, now)
        del self.fleet.endpoints[ticket.endpoint].held[ticket.id]
        ticket.endpoint = ""

    def _slot(self, ticket: Ticket) -> int:
        return self.fleet.endpoints[ticket.endpoint].slot


def _end(ticket: Ticket) -> float:
    """When it may wait no longer: its deadline, or its objective's longest queue before any attempt."""
    ends = [ticket.promise.deadline_at, None if ticket.attempt else ticket.promise.refuse_at]
    return min((end for end in ends if end is not None), default=float("inf"))
