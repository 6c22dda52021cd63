"""The lines in which requests wait: in the policy's order, or each tenant's in its turn, and those set aside."""

import bisect
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator

from scheduler.fairness import Accounts
from scheduler.longest import Longest
from scheduler.queue import Place, Queue, by_age, by_rank, by_size, by_turn
from scheduler.state import Ticket

OLDEST_AMONG = 1000
"The oldest waits near the front: rank grows with arrival, and only a promise much looser hides one."


SPARE_S = 10.0
"Seconds before its due moment a request needs its turn besides: what is served is not served at an even rate."


class TenantLine:
    """One tenant's: in the policy's order, and by when their turns begin to count."""

    def __init__(self) -> None:
        self.by_rank = Queue(by_rank)
        self.by_turn = Queue(by_turn)
        self.service = 0.0
        "Tokens of service that it waits for."

    def add(self, ticket: Ticket, service: float) -> None:
        """One more."""
        self.service += service
        self.by_rank.add(ticket)
        self.by_turn.add(ticket)

    def remove(self, ticket: Ticket, service: float) -> None:
        """One less."""
        self.by_rank.remove(ticket)
        self.by_turn.remove(ticket)
        self.service = self.service - service if self.by_rank else 0.0


class TenantLines:
    """A line for each tenant. First comes the head of a tenant in the lowest band; within a band, the policy's first.

    A tenant all of whom can wait comes behind those who cannot: its turn counts from the moment from which one of them
    needs it. That is when all that the tenant waited for, when this one came, just about fits before its due moment at the
    tenant's share. So it loses nothing, and who is in a hurry has the places that it does not need yet.

    Two sorted lists make it cheap: each tenant's own line, and the tenants by (band, their head's place), of which
    only the first `count` can be among the first `count` requests, or are looked at. Most turns change neither band nor
    head, and touch the tenant's own line alone.
    """

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self._now = -math.inf
        self._lines: dict[str, TenantLine] = {}
        self._services: dict[str, float] = {}
        "Tokens of service that each was believed to need when it came, by request id."
        self._weight = 0.0
        "Of all tenants who wait."
        self._seats: dict[str, tuple[int, Place]] = {}
        self._order: list[tuple[int, Place, str]] = []

    def __len__(self) -> int:
        return len(self._services)

    def __iter__(self) -> Iterator[Ticket]:
        return itertools.chain.from_iterable(line.by_rank for line in self._lines.values())

    def pass_time(self, now: float) -> None:
        """It is so late now, in unix seconds."""
        self._now = now
        self.accounts.pass_time(now)

    def add(self, ticket: Ticket) -> None:
        """Put it into its tenant's line."""
        tenant = ticket.request.tenant
        if tenant not in self._lines:
            self._lines[tenant] = TenantLine()
            self._weight += self.accounts.weight(tenant)
            self.accounts.join(tenant)
        line = self._lines[tenant]
        service = self.accounts.service(ticket.prompt_tokens, ticket.output_tokens)
        ticket.turn_at = self._turn_at(ticket, line.service + service)
        self._services[ticket.id] = service
        line.add(ticket, service)
        self._seat(tenant)

    def _turn_at(self, ticket: Ticket, service: float) -> float:
        """From when it needs its tenant's turn, with so much to be served until it is."""
        if ticket.due_at == math.inf:
            return -math.inf  # it has no time to spare, nobody said so
        share = self.accounts.weight(ticket.request.tenant) / self._weight
        return ticket.due_at - SPARE_S - self.accounts.drain_s(service, share)

    def remove(self, ticket: Ticket) -> None:
        """Take it out."""
        tenant = ticket.request.tenant
        self._lines[tenant].remove(ticket, self._services.pop(ticket.id))
        self._seat(tenant)

    def charge(self, tenant: str, service: float) -> None:
        """This tenant is given so many tokens of service."""
        self.accounts.charge(tenant, service)
        if tenant in self._lines:
            self._seat(tenant)

    def head(self, count: int) -> list[Ticket]:
        """The next `count`."""
        first = [tenant for _, _, tenant in self._order[:count]]
        return self._merged({one: self._lines[one].by_rank.items(count) for one in first}, count)

    def joined(self, line: list[Ticket], others: Iterable[Ticket]) -> list[Ticket]:
        """These and others in the order in which they would have their turns."""
        everybody = sorted((ticket.order, ticket) for ticket in (*line, *others))
        by_tenant: dict[str, list[tuple[Place, Ticket]]] = {}
        for one in everybody:
            by_tenant.setdefault(one[1].request.tenant, []).append(one)
        return self._merged({t: iter(own) for t, own in by_tenant.items()}, len(everybody))

    def _can_wait(self, tenant: str) -> bool:
        """Whether none of its requests needs its turn yet."""
        line = self._lines.get(tenant)
        return line is not None and line.by_turn.first[0] > self._now

    def _merged(self, lines: dict[str, Iterator[tuple[Place, Ticket]]], count: int) -> list[Ticket]:
        """The first of these lines together, each tenant charged the predicted cost of its requests that are already in."""
        settings, accounts = self.accounts.settings, self.accounts
        quantum, output_weight = settings.quantum_tokens, settings.output_weight
        heap = []
        for tenant, line in lines.items():
            had, share = accounts.had(tenant), accounts.weight(tenant)
            can_wait = self._can_wait(tenant)
            heap.append((can_wait, had // quantum, *next(line), line, had, share))
        heapq.heapify(heap)  # by band and place, of which no two are alike
        merged: list[Ticket] = []
        while heap and len(merged) < count:
            can_wait, _, _, ticket, line, had, share = heap[0]
            merged.append(ticket)
            following = next(line, None)
            if following is None:
                heapq.heappop(heap)
            else:
                had += (ticket.prompt_tokens + output_weight * ticket.output_tokens) / share
                heapq.heapreplace(heap, (can_wait, had // quantum, *following, line, had, share))
        return merged

    def _seat(self, tenant: str) -> None:
        """Put the tenant where its account and its head belong; who waits no more has no seat."""
        line, old = self._lines[tenant].by_rank, self._seats.get(tenant)
        seat = None
        if line:
            seat = self.accounts.band(self.accounts.had(tenant)), line.first
        if seat == old:
            return
        if old is not None:
            del self._order[bisect.bisect_left(self._order, (*old, tenant))]
        if seat is None:
            del self._lines[tenant], self._seats[tenant]
            self._weight = self._weight - self.accounts.weight(tenant) if self._lines else 0.0
        else:
            self._seats[tenant] = seat
            bisect.insort(self._order, (*seat, tenant))
        if self._order:
            self.accounts.lift(self._order[0][0])


class Lines:
    """Everybody who waits: those who can make it in the policy's order, those set aside in three."""

    def __init__(self, accounts: Accounts | None = None) -> None:
        """Keep the order of the policy, or with accounts the turns of tenants."""
        self.by_tenant = None if accounts is None else TenantLines(accounts)
        self.longest = None if accounts is None else Longest(accounts.settings.weights)
        self.waiting: Queue | TenantLines = (
            Queue(by_rank) if self.by_tenant is None else self.by_tenant
        )
        self.aside = Queue(by_rank)
        "The same order, to see who can make it after all."
        self.aside_by_size = Queue(by_size)
        "Who fits into an idle moment."
        self.aside_by_age = Queue(by_age)
        "Who has been patient longest."
        self.by_model: dict[str, dict[str, Ticket]] = {}
        "The same tickets by the model they ask for."
        self.sheddable = Queue(by_age)
        "Those of a priority below 0."
        self.tokens = 0
        "Prompt tokens of all of them: the backlog, before any endpoint is chosen."
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def pass_time(self, now: float) -> None:
        """It is so late now, in unix seconds."""
        if self.by_tenant is not None:
            self.by_tenant.pass_time(now)

    def since(self) -> list[float]:
        """When the longest waiting came, of those near the front of each line; empty: nobody waits."""
        oldest = self.aside_by_age.head(1) + self.waiting.head(OLDEST_AMONG)
        return [ticket.enqueued_at for ticket in oldest]

    def add(self, ticket: Ticket) -> None:
        """Let it wait among those who can make it; the next plan tells."""
        self.waiting.add(ticket)
        self.by_model.setdefault(ticket.request.model, {})[ticket.id] = ticket
        if ticket.promise.priority < 0:
            self.sheddable.add(ticket)
        if self.longest is not None:
            self.longest.add(ticket)
        self.tokens += ticket.prompt_tokens
        self._count += 1

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
        if ticket.promise.priority < 0:
            self.sheddable.remove(ticket)
        if self.longest is not None:
            self.longest.remove(ticket)
        self.tokens -= ticket.prompt_tokens
        self._count -= 1

    def resize(self, ticket: Ticket, prompt_tokens: int) -> None:
        """Its prompt is believed to be so long from now on."""
        is_aside = ticket.state == "set_aside"
        if is_aside:
            self.aside_by_size.remove(ticket)
        self.tokens += prompt_tokens - ticket.prompt_tokens
        ticket.prompt_tokens = prompt_tokens
        if is_aside:
            self.aside_by_size.add(ticket)

    def charge(self, ticket: Ticket, prompt_tokens: float, output_tokens: float) -> None:
        """Its tenant is given this much, in place of what was charged for the same request before."""
        if self.by_tenant is not None:
            service = self.by_tenant.accounts.service(prompt_tokens, output_tokens)
            self.by_tenant.charge(ticket.request.tenant, service - ticket.charged)
            ticket.charged = service

    def settle(self, ticket: Ticket, *, is_kept: bool) -> None:
        """Its promise was kept, or will not be: said to its tenant's account, once."""
        if self.by_tenant is not None and not ticket.is_settled:
            ticket.is_settled = True
            self.by_tenant.accounts.settle(ticket.request.tenant, is_kept=is_kept)

    def set_aside(self, ticket: Ticket) -> None:
        """Out of the way of those who can make it."""
        self.settle(ticket, is_kept=False)
        self.waiting.remove(ticket)
        ticket.transition("set_aside")
        for line in (self.aside, self.aside_by_size, self.aside_by_age):
            line.add(ticket)

    def take_up(self, ticket: Ticket) -> None:
        """It can make it after all."""
        for line in (self.aside, self.aside_by_size, self.aside_by_age):
            line.remove(ticket)
        ticket.transition("take_up")
        self.waiting.add(ticket)
