"""One request in two jobs: its prompt computed on one endpoint, its answer decoded on another.

    1. the plan gives a request's `prefill` leg to an endpoint of that role, where that and what follows is predicted
       to be the earliest: beside it stand all endpoints that would serve it whole, those that decode among them
    2. a place is pledged where its answer could be decoded, so that nothing is computed for nobody
    3. its reward says `prefilled`: the KV is kept over there, under the engine's lease, and the request waits
    4. only now is its `decode` leg bound, with exact slack; that endpoint fetches the KV
    5. its first token frees what was kept; lost before that, the request waits as it did at its beginning, and
       what nobody fetches stays with the engine for as long as it is kept

Without an endpoint whose only role is `prefill` nothing of this is ever looked at.
"""

import msgspec
import numpy as np

from scheduler.fleet import Fleet
from scheduler.queue import Queue, by_rank
from scheduler.state import Floats, Kept, Ticket


class Pledge(msgspec.Struct, frozen=True):
    """Room on an endpoint that decodes, for a prompt that is being computed elsewhere."""

    slot: int
    kv: float
    "Tokens."


class Legs:
    """Requests between two legs, and what is kept and pledged for them. Part of the `Book`."""

    def __init__(self) -> None:
        """No request is between two legs."""
        self.prefilled = Queue(by_rank)
        "Requests whose prompt is computed and that no endpoint decodes yet."
        self.kept: dict[str, Kept] = {}
        "By request: KV that nobody has fetched yet."
        self._unclaimed: list[Kept] = []
        "KV that nobody will fetch: engines have no way to free it sooner."
        self.pledges: dict[str, Pledge] = {}
        "By request, while its prefill leg is under way."

    def wait(self, ticket: Ticket, kept: Kept) -> None:
        """Its prompt is computed: it waits for an endpoint that decodes."""
        self.pledges.pop(ticket.id, None)
        self.kept[ticket.id] = kept
        self.prefilled.add(ticket)

    def bind(self, ticket: Ticket, endpoint: str) -> None:
        """This endpoint is to decode it."""
        self.prefilled.remove(ticket)
        self.kept[ticket.id].target = endpoint

    def leave(self, ticket: Ticket) -> None:
        """It waits for its decode leg no more, and its KV is not wanted."""
        self.prefilled.remove(ticket)
        self.forget(ticket.id)

    def fetched(self, request_id: str) -> None:
        """Its KV is where it is decoded, and no longer where it was computed."""
        self.kept.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Nobody wants any more what is kept or pledged for it."""
        kept = self.kept.pop(request_id, None)
        if kept is not None:
            self._unclaimed.append(kept)
        self.pledges.pop(request_id, None)

    def lost(self, now: float) -> list[Ticket]:
        """Requests between two legs whose KV may be forgotten by now."""
        return [t for t in self.prefilled if self.kept[t.id].until_at <= now]

    def next_loss_at(self) -> float | None:
        """When the first of them may lose its KV; None: nobody waits between two legs."""
        return min((self.kept[t.id].until_at for t in self.prefilled), default=None)

    def lose(self, endpoint: str, slot: int) -> list[Ticket]:
        """An endpoint is gone, and with it the places pledged there; returns the requests whose KV it kept."""
        self.pledges = {key: p for key, p in self.pledges.items() if p.slot != slot}
        return self.waiting_for(endpoint)

    def waiting_for(self, endpoint: str) -> list[Ticket]:
        """Requests between two legs whose KV this endpoint keeps."""
        return [t for t in self.prefilled if self.kept[t.id].endpoint == endpoint]

    def kept_kv(self, fleet: Fleet, now: float) -> Floats:
        """KV tokens that each endpoint keeps, also those that nobody will fetch, until their lease ends; float64[n_slots]."""
        found = np.zeros(len(fleet.by_slot))
        self._unclaimed = [kept for kept in self._unclaimed if kept.until_at > now]
        for kept in (*self.kept.values(), *self._unclaimed):
            endpoint = fleet.endpoints.get(kept.endpoint)
            if endpoint is not None and endpoint.epoch == kept.epoch:
                found[endpoint.slot] += kept.tokens
        return found
