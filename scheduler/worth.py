"""What a request gains by being somewhere, less what it breaks there: promises per token against one another."""

import functools
import math
from collections.abc import Callable

import numpy as np

from scheduler.offers import Offers
from scheduler.onward import Onward
from scheduler.pace import Noise
from scheduler.profile.casting import Casting
from scheduler.room import Room
from scheduler.state import Bools, Floats
from scheduler.work import Offer

PACE_ODDS_MIN = 0.1
"Below this chance to keep its pace a request gains nothing by being there."

PACE_TIE = 0.1
"Places that gain so nearly as much as the best are left to the earliest first token."

SHORT_ANSWER = 16
"The fewest tokens over which a stall for prefill is thought to be spread."


class Worth:
    """Made for one step, with its room."""

    def __init__(
        self,
        room: Room,
        offers: Offers,
        *,
        pace_worth: float,
        noise: Callable[[], Noise],
        onward: Onward | None,
        casting: Casting | None,
    ) -> None:
        """Judge by these.

        Args:
            room: of the step.
            offers: what fits where.
            pace_worth: of `PlanSettings`.
            noise: how far off the predicted pace may be; asked once, if ever.
            onward: what follows a prefill leg; None where nobody only prefills.
            casting: a profile, which says itself where it is better put.
        """
        self._room = room
        self._offers = offers
        self._pace_worth = pace_worth
        self._ask_noise = noise
        self._onward = onward
        self._casting = casting
        if casting is not None:
            casting.worth = self.of

    @functools.cached_property
    def noise(self) -> Noise:
        """How far off the predicted pace may be."""
        return self._ask_noise()

    def allows(self, offer: Offer, candidates: Bools | None = None) -> Bools | None:
        """Where it gains more than it breaks, and nearly as much as anywhere; None: nobody asks.

        The earliest first token decides among them. A profile says so itself of these candidates, or of all.
        """
        if self._casting is not None:
            open_ = self._offers.total_s(offer) < math.inf
            return self._casting.wishes(offer, open_ if candidates is None else open_ & candidates)
        value = self.of(offer)
        if value is None:
            return None
        best = np.maximum.reduce(value, where=offer.service_s < math.inf, initial=0.0)
        worthy: Bools = (value > 0) & (value >= best - PACE_TIE)
        return worthy

    def of(self, offer: Offer) -> Floats | None:
        """What it gains less what it breaks: the odds of its own pace against what it takes from the others'."""
        room, promise = self._room, offer.ticket.promise
        if self._pace_worth <= 0 or (promise.tpot_s is None and not room.decodes.is_bound):
            return None
        kv = self._room.held_kv(offer.prompt, offer.kv)
        pace_s = room.decodes.pace_s(kv)
        gain = np.ones(len(pace_s))
        if promise.tpot_s is not None and promise.tpot_s >= room.decodes.load.alone_s.min():
            gain = self.noise.odds(promise.tpot_s, pace_s)
            gain[gain < PACE_ODDS_MIN] = 0.0
        gain = promise.weight * gain
        value = gain - self._harm(offer.work_s, offer, kv, pace_s)
        if self._onward is not None and not offer.is_second:
            # A prefill leg is worth what its answer is where that would be decoded, beside which nobody prefills.
            target, _ = self._onward.target(offer.ticket)
            apart = gain - self._harm(0.0, offer, kv, pace_s)
            value[self._onward.is_prefill] = apart[target]
        worth: Floats = value
        return worth

    def _harm(self, work_s: Floats | float, offer: Offer, kv: Floats, pace_s: Floats) -> Floats:
        """What the promises per token of those who are there are worth that it would break, with so many seconds of prefill."""
        decodes = self._room.decodes
        added_s = decodes.load.sequence_s + decodes.load.token_s * kv
        added_s = added_s + work_s / max(SHORT_ANSWER, offer.ticket.output_tokens)
        broken = self.noise.harm(np.minimum(decodes.tightest_s, 1e3), pace_s, added_s / pace_s)
        harm: Floats = self._pace_worth * decodes.promised * broken
        return harm
