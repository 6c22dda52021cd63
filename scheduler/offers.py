"""What a request would cost on every slot, in seconds, and where there is no KV for it."""

import math
from collections.abc import Callable

from scheduler.onward import Onward
from scheduler.prefix import BLOCK_TOKENS
from scheduler.profile.casting import Casting
from scheduler.room import Room
from scheduler.state import Floats, Ticket
from scheduler.work import Offer, Work


class Offers:
    """Made for one step, with its room."""

    def __init__(
        self,
        room: Room,
        *,
        work: Callable[[Ticket], Work],
        barrier: Callable[[str], Floats],
        onward: Onward | None,
        casting: Casting | None,
    ) -> None:
        """Price by these.

        Args:
            room: of the step.
            work: what is left to compute of a request.
            barrier: by model, 0 for each slot where a request may go, `inf` where not.
            onward: what follows a prefill leg; None where nobody only prefills.
            casting: a profile, whose filters close slots; None: nobody else has a say.
        """
        self._room = room
        self._work = work
        self._barrier = barrier
        self._onward = onward
        self._casting = casting
        self._fixed_s: dict[str, Floats] = {}
        "By model, what does not depend on the prompt."

    def of(self, ticket: Ticket) -> Offer:
        """What it would cost on every slot, all that follows a prefill leg included."""
        offer = self.whole(ticket)
        if self._onward is not None:
            offer = self._onward.reach(offer)
        return offer if self._casting is None else self._casting.narrowed(offer)

    def whole(self, ticket: Ticket) -> Offer:
        """What it would cost on every slot to serve it, or as much of it as that slot serves."""
        room, work, model = self._room, self._work(ticket), ticket.request.model
        fixed_s = self._fixed_s.get(model)
        if fixed_s is None:
            fixed_s = self._fixed_s[model] = room.rates.overhead_s + self._barrier(model)
        work_s = work.tokens * room.rates.token_s + work.pairs * room.rates.pair_s
        service_s = work_s + fixed_s
        if work.prompt > room.length_least:
            service_s[work.prompt > room.length_max] = math.inf
        kv = room.asked_kv(ticket)
        return Offer(ticket, work, kv, work_s, service_s)

    def total_s(self, offer: Offer) -> Floats:
        """Predicted seconds to its first token; `inf` where it may not go or finds no room now."""
        total_s: Floats = self._room.open_s + offer.service_s
        if self._room.is_tight(offer.kv):
            self._keep_out(offer, total_s)
        return total_s

    def _keep_out(self, offer: Offer, total_s: Floats) -> None:
        """Make it endless seconds where there is no KV for it, with what others there hold as well."""
        room, blocks = self._room, offer.ticket.request.blocks
        kv = room.held_kv(offer.work.prompt, offer.kv)
        lacking = kv - room.kv
        total_s[lacking > BLOCK_TOKENS * len(blocks)] = math.inf
        if not blocks:
            return
        for slot in ((lacking > 0) & (total_s < math.inf)).nonzero()[0].tolist():
            depth = math.ceil(lacking[slot] / BLOCK_TOKENS)
            if depth > kv[slot] // BLOCK_TOKENS or blocks[depth - 1] not in room.pins.held(slot):
                total_s[slot] = math.inf
