"""Where a prompt that is computed could be decoded, and how soon: the second half of a plan in two legs.

An endpoint that only prefills is priced as if it served a request whole: its own seconds, and then the transfer, the
wait and the pace of the endpoint that would decode it best as things are. So one comparison decides between the
halves and a whole, by predicted seconds and promises, and never by a threshold.
"""

import math

import msgspec
import numpy as np

from scheduler.fleet import Fleet
from scheduler.legs import Legs
from scheduler.room import Room
from scheduler.state import Bools, Floats, Ticket
from scheduler.transfer import Transfer
from scheduler.work import Offer

STALL_WORTH = 0.1
"""
What a second of prefill costs each of those who decode beside it, in seconds of the newcomer's first token.

Below, prompts go to whoever decodes as long as no promise is seen to break, until many break at once; at 1 endpoints
that decode compute prompts only where everybody else is late. 0.03, 0.1, 0.3 and 1 were tried.
"""

HEADROOM = 0.75
"""
Where the pace is slower than this part of the tightest promise, no prompts are computed beside those who decode.

What is left above it is for more who decode: their pace is known, what prompts do to it comes in lumps.
"""


class Onward:
    """Made for one step, and used up with its room."""

    def __init__(
        self,
        room: Room,
        fleet: Fleet,
        legs: Legs,
        transfer: Transfer,
        *,
        step_s: Floats,
        batch: Floats,
        now: float,
    ) -> None:
        """Take from the room what is kept for others.

        Args:
            room: of the step.
            fleet: who has which role.
            legs: what is kept and pledged.
            transfer: what fetching costs.
            step_s: float64[n_slots], a decode step with one more in it.
            batch: float64[n_slots], how many decode.
            now: unix seconds.
        """
        self.is_prefill: Bools = fleet.is_prefill
        "Which slots take prefill legs, and nothing else."
        self._room = room
        self._batch = batch
        self._closed_s = np.where(fleet.is_decode, 0.0, np.inf)
        self._transfer = transfer
        self._step_s = step_s
        self._ahead = np.zeros(len(step_s))
        "float64[n_slots]: bytes that are on their way to it."
        self._link: Floats = np.minimum(
            transfer.links, transfer.links[self.is_prefill].max(initial=0.0)
        )
        "float64[n_slots]: bytes a second from the quickest endpoint that only prefills."
        self._targets: dict[str, tuple[int, float]] = {}
        "By request: where its answer would be decoded, and the seconds to its first token from the end of its prefill."
        self._sources: dict[str, int] = {}
        "By request of a second leg: the slot that keeps its KV."
        room.withhold(legs.kept_kv(fleet, now))
        for kept in legs.kept.values():
            target = fleet.endpoints.get(kept.target)
            if target is not None:
                self._ahead[target.slot] += kept.tokens * transfer.token_bytes[target.slot]

    def hold(self, legs: Legs) -> None:
        """Keep the pledged places, once the requests whose prompt is computed have theirs."""
        for pledge in legs.pledges.values():
            self._room.pledge(pledge.slot, pledge.kv)

    def reach(self, offer: Offer) -> Offer:
        """The offer with what follows a prefill leg added to its seconds; `inf` beside decodes whose pace is short."""
        join_s = self._room.open_s + self.join_s(offer)
        join_s[self._room.kv < np.minimum(offer.kv, self._room.kv_max)] = math.inf
        target = self._best(offer, join_s)
        self._targets[offer.ticket.id] = target, float(join_s[target])
        service_s = offer.service_s.copy()
        service_s[self.is_prefill] += join_s[target]
        decodes = self._room.decodes
        if decodes.is_bound:
            pace_s = decodes.pace_s(np.minimum(offer.kv, self._room.kv_max))
            service_s[~self.is_prefill & (pace_s > HEADROOM * decodes.tightest_s)] = math.inf
        return msgspec.structs.replace(offer, service_s=service_s)

    def target(self, ticket: Ticket) -> tuple[int, float]:
        """Where its answer would be decoded, as things are, and how long after its prefill it would begin."""
        return self._targets[ticket.id]

    def stalls_s(self, offer: Offer) -> Floats:
        """What its prompt costs those who decode where it is computed, in seconds of its own first token."""
        stalls_s: Floats = STALL_WORTH * self._batch * offer.work_s
        stalls_s[self.is_prefill] = 0.0
        return stalls_s

    def is_idle(self) -> Bools:
        """Which slots may count as idle: one that decodes under promises has no line of prompts, and is not."""
        idle: Bools = self.is_prefill | (self._room.decodes.promised == 0)
        return idle

    def second_leg(self, offer: Offer, source: int) -> Offer:
        """What is left of a request whose KV is at `source`: no work, but the fetching."""
        self._sources[offer.ticket.id] = source
        service_s = self.join_s(offer, source)
        service_s[~np.isfinite(offer.service_s)] = math.inf
        return msgspec.structs.replace(
            offer, work_s=np.zeros(len(service_s)), service_s=service_s, is_second=True
        )

    def join_s(self, offer: Offer, source: int | None = None) -> Floats:
        """Seconds from the end of its prefill to its first token, but for the line there; `inf` where none is decoded."""
        bytes_each = self._transfer.token_bytes * self._fetched(offer)
        join_s: Floats = self._closed_s + self._transfer.seconds(
            bytes_each, self._ahead, self._step_s, self._link_from(source)
        )
        join_s[offer.work.prompt > self._room.length_max] = math.inf
        return join_s

    def features(self, offer: Offer, slot: int) -> tuple[str, ...]:
        """What the predictor of transfers saw of a second leg."""
        source = self._sources[offer.ticket.id]
        return self._transfer.features(
            own=float((self._transfer.token_bytes * self._fetched(offer))[slot]),
            ahead=float(self._ahead[slot]),
            step_s=float(self._step_s[slot]),
            link=float(self._link_from(source)[slot]),
        )

    def _fetched(self, offer: Offer) -> Floats:
        """KV tokens that each would have to fetch: what its own cache has not."""
        fetched: Floats = np.full(len(self._step_s), offer.work.prompt)
        if offer.work.cached is not None:
            fetched -= np.minimum(offer.work.cached, offer.work.prompt - 1.0)
        return fetched

    def _best(self, offer: Offer, join_s: Floats) -> int:
        """The earliest, of those where its pace would be kept if there are any."""
        promised_s = offer.ticket.promise.tpot_s
        if promised_s is not None:
            kv = np.minimum(offer.kv, self._room.kv_max)
            kept: Bools = self._room.decodes.pace_s(kv) <= promised_s
            kept_s = np.where(kept, join_s, np.inf)
            slot = int(kept_s.argmin())
            if kept_s[slot] < math.inf:
                return slot
        return int(np.argmin(join_s))

    def _link_from(self, source: int | None) -> Floats:
        if source is None:
            return self._link
        slower: Floats = np.minimum(self._transfer.links, self._transfer.links[source])
        return slower
