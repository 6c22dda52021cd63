"""One line, always in order.

A request's place is fixed while it waits, so a newcomer is put in by bisection and nothing is ever sorted again:
looking at the most urgent 256 of 100,000 costs what 256 cost.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator

from scheduler.state import Ticket

GAP_MAX = 512
"So many who left at the front of a line are forgotten at once; twice the plan's horizon, so that whoever is planned does."

Place = tuple[float, float, str]
"A number, ties to the older, then by id."


def by_rank(ticket: Ticket) -> Place:
    """The policy's order."""
    return ticket.order


def by_size(ticket: Ticket) -> Place:
    """Shortest prompt first."""
    return float(ticket.prompt_tokens), ticket.enqueued_at, ticket.id


def by_turn(ticket: Ticket) -> Place:
    """Who needs its tenant's turn soonest first."""
    return ticket.turn_at, ticket.enqueued_at, ticket.id


def by_age(ticket: Ticket) -> Place:
    """Longest waiting first."""
    return ticket.enqueued_at, ticket.enqueued_at, ticket.id


class Queue:
    """Tickets in the order of a fixed place each; first is next.

    Most leave at the front. There a gap is left, so that 100,000 behind them need not be moved for each.
    """

    def __init__(self, place: Callable[[Ticket], Place]) -> None:
        self._place = place
        self._places: list[Place] = []
        self._tickets: list[Ticket] = []
        "In the same order."
        self._start = 0
        "Where the line begins; what stands before it has left."

    def __len__(self) -> int:
        return len(self._places) - self._start

    def __iter__(self) -> Iterator[Ticket]:
        return itertools.islice(self._tickets, self._start, None)

    def add(self, ticket: Ticket) -> None:
        """Put it in its place."""
        place = self._place(ticket)
        at = bisect.bisect_left(self._places, place, self._start)
        assert at == len(self._places) or self._places[at] != place, (
            f"request {ticket.id!r} already stands in this line"
        )
        self._places.insert(at, place)
        self._tickets.insert(at, ticket)

    def remove(self, ticket: Ticket) -> None:
        """Take it out."""
        start, places = self._start, self._places
        at = bisect.bisect_left(places, self._place(ticket), start)
        assert places[at][2] == ticket.id, f"request {ticket.id!r} has moved while it waited"
        if at - start >= GAP_MAX:
            del places[at], self._tickets[at]
            return
        places[start + 1 : at + 1] = places[start:at]
        self._tickets[start + 1 : at + 1] = self._tickets[start:at]
        self._start += 1
        if self._start == GAP_MAX or not self:
            del places[: self._start], self._tickets[: self._start]
            self._start = 0

    @property
    def first(self) -> Place:
        """The place of the next, of whom there must be one."""
        return self._places[self._start]

    def items(self, count: int) -> Iterator[tuple[Place, Ticket]]:
        """The next `count` with their places."""
        part = slice(self._start, self._start + count)
        return zip(self._places[part], self._tickets[part], strict=True)

    def head(self, count: int) -> list[Ticket]:
        """The next `count`."""
        return self._tickets[self._start : self._start + count]

    def tail(self, count: int) -> list[Ticket]:
        """The last `count`, last first."""
        return self._tickets[max(self._start, len(self._tickets) - count) :][::-1]

    def joined(self, line: list[Ticket], others: Iterable[Ticket]) -> list[Ticket]:
        """A part of this line with others at their places in it."""
        joined = line.copy()
        for ticket in others:
            bisect.insort(joined, ticket, key=self._place)
        return joined
