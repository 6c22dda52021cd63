"""The lines in which requests wait, always in order.

A request's place is fixed while it waits, so a newcomer is put in by bisection and nothing is ever sorted again:
looking at the most urgent 256 of 100,000 costs what 256 cost.
"""

import bisect
from collections.abc import Callable, Iterator

from scheduler.state import Ticket

OLDEST_AMONG = 1000
"The oldest waits near the front: rank grows with arrival, and only a promise much looser hides one."

Place = tuple[float, float, str]
"A number, ties to the older, then by id."


def by_rank(ticket: Ticket) -> Place:
    """The policy's order."""
    return ticket.order


def by_size(ticket: Ticket) -> Place:
    """Shortest prompt first."""
    return float(ticket.prompt_tokens), ticket.enqueued_at, ticket.id


def by_age(ticket: Ticket) -> Place:
    """Longest waiting first."""
    return ticket.enqueued_at, ticket.enqueued_at, ticket.id


class Queue:
    """Tickets in the order of a fixed place each; first is next."""

    def __init__(self, place: Callable[[Ticket], Place]) -> None:
        self._place = place
        self._places: list[Place] = []
        self._tickets: dict[str, Ticket] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Ticket]:
        return (self._tickets[place[2]] for place in self._places)

    def add(self, ticket: Ticket) -> None:
        """Put it in its place."""
        assert ticket.id not in self._tickets, f"request {ticket.id!r} already stands in this line"
        self._tickets[ticket.id] = ticket
        bisect.insort(self._places, self._place(ticket))

    def remove(self, ticket: Ticket) -> None:
        """Take it out."""
        del self._tickets[ticket.id]
        at = bisect.bisect_left(self._places, self._place(ticket))
        assert self._places[at][2] == ticket.id, f"request {ticket.id!r} has moved while it waited"
        del self._places[at]

    def head(self, count: int, start: int = 0) -> list[Ticket]:
        """The next `count` from `start` on."""
        return [self._tickets[place[2]] for place in self._places[start : start + count]]

    def tail(self, count: int) -> list[Ticket]:
        """The last `count`, last first."""
        return [self._tickets[place[2]] for place in self._places[: -count - 1 : -1]]


class Lines:
    """Everybody who waits: those who can make it in the policy's order, those set aside in three."""

    def __init__(self) -> None:
        self.waiting = Queue(by_rank)
        self.aside = Queue(by_rank)
        "The same order, to see who can make it after all."
        self.aside_by_size = Queue(by_size)
        "Who fits into an idle moment."
        self.aside_by_age = Queue(by_age)
        "Who has been patient longest."
        self.by_model: dict[str, dict[str, Ticket]] = {}
        "The same tickets by the model they ask for."
        self.tokens = 0
        "Prompt tokens of all of them: the backlog, before any endpoint is chosen."

    def __len__(self) -> int:
        return len(self.waiting) + len(self.aside)

    def since(self) -> list[float]:
        """When the longest waiting came, of those near the front of each line; empty: nobody waits."""
        oldest = self.aside_by_age.head(1) + self.waiting.head(OLDEST_AMONG)
        return [ticket.enqueued_at for ticket in oldest]

    def add(self, ticket: Ticket) -> None:
        """Let it wait among those who can make it; the next plan tells."""
        self.waiting.add(ticket)
        self.by_model.setdefault(ticket.request.model, {})[ticket.id] = ticket
        self.tokens += ticket.prompt_tokens

    def remove(self, ticket: Ticket) -> None:
        """It waits no longer, wherever it stood."""
        if ticket.state == "set_aside":
            for line in (self.aside, self.aside_by_size, self.aside_by_age):
                line.remove(ticket)
        else:
            self.waiting.remove(ticket)
        same = self.by_model[ticket.request.model]
        del same[ticket.id]
        if not same:
            del self.by_model[ticket.request.model]
        self.tokens -= ticket.prompt_tokens

    def set_aside(self, ticket: Ticket) -> None:
        """Out of the way of those who can make it."""
        self.waiting.remove(ticket)
        ticket.turn("set_aside")
        for line in (self.aside, self.aside_by_size, self.aside_by_age):
            line.add(ticket)

    def take_up(self, ticket: Ticket) -> None:
        """It can make it after all."""
        for line in (self.aside, self.aside_by_size, self.aside_by_age):
            line.remove(ticket)
        ticket.turn("take_up")
        self.waiting.add(ticket)
