"""Whose line is the longest, for its weight: who gives way where the pool is full.

Longest-queue drop (Suter, Lakshman, Stiliadis and Choudhury, 1999): a newcomer takes the place of the latest of the
longest line, unless its own would then be as long. So whoever floods a pool loses requests of its own, and a
tenant below its share of the places loses none.
"""

import bisect
from collections.abc import Mapping

from scheduler.queue import Queue, by_age
from scheduler.state import Ticket


class Longest:
    """Everybody who waits, by tenant; tenants by the length of their lines over their weights."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Nobody waits yet; who has no weight has 1."""
        self._weights = weights
        self._lines: dict[str, Queue] = {}
        self._order: list[tuple[float, str]] = []

    def add(self, ticket: Ticket) -> None:
        """It joins its tenant's line."""
        tenant = ticket.request.tenant
        line = self._lines.setdefault(tenant, Queue(by_age))
        before = len(line)
        line.add(ticket)
        self._move(tenant, before, len(line))

    def remove(self, ticket: Ticket) -> None:
        """It waits no longer."""
        tenant = ticket.request.tenant
        line = self._lines[tenant]
        before = len(line)
        line.remove(ticket)
        self._move(tenant, before, len(line))
        if not line:
            del self._lines[tenant]

    def last(self, tenant: str) -> Ticket | None:
        """Who gives way to one more of this tenant; None: nobody's line would be longer than its own."""
        if not self._order:
            return None
        length, longest = self._order[-1]
        if length <= self._length(tenant, len(self._lines.get(tenant, ())) + 1):
            return None
        [last] = self._lines[longest].tail(1)
        return last

    def _move(self, tenant: str, before: int, after: int) -> None:
        if before:
            place = self._length(tenant, before), tenant
            del self._order[bisect.bisect_left(self._order, place)]
        if after:
            bisect.insort(self._order, (self._length(tenant, after), tenant))

    def _length(self, tenant: str, count: int) -> float:
        return count / self._weights.get(tenant, 1.0)
