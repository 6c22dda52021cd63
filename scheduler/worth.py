"""Promises per token that placing a request somewhere keeps, less those of others that it breaks."""

import functools
import math
import weakref
from collections.abc import Callable

import numpy as np

from scheduler.onward import Onward
from scheduler.pace import Noise
from scheduler.plan import PlanSettings
from scheduler.profile.casting import Casting
from scheduler.room import Room
from scheduler.state import Bools, Floats, Ticket
from scheduler.work import Offer

PACE_ODDS_MIN = 0.1
"Below this chance to keep its pace a request gains nothing by being there."

PACE_TIE = 0.1
"Places that gain so nearly as much as the best are left to the earliest first token."

PROMISE_MAX_S = 1e3
"No promise per token is thought to be longer: where nobody was made any, the odds are still numbers."

SAID = 0.5
"The part of its answer that who is there has said already, in the mean."

SHORT_ANSWER = 16
"A stall for prefill is spread over the answer's tokens, and over no fewer than these."


class Worth:
    """Made for one step, with its room."""

    def __init__(
        self,
        room: Room,
        *,
        settings: PlanSettings,
        noise: Callable[[], Noise],
        standing: Callable[[str], float] | None,
        broken: Callable[[Offer], Floats],
        now: float,
        onward: Onward | None,
        casting: Casting | None,
    ) -> None:
        """Judge by these.

        Args:
            room: of the step.
            settings: what is worth how much.
            noise: how far off the predicted pace may be; asked once, if ever.
            standing: by tenant, what its promises count; None: all alike.
            broken: by slot, how many promised first tokens of requests to come it would probably break.
            now: unix seconds.
            onward: what follows a prefill leg; None where nobody only prefills.
            casting: a profile, which says itself where it is better put.
        """
        self._room = room
        self._settings = settings
        self._ask_noise = noise
        self._standing = standing
        self._broken = broken
        self._now = now
        self._onward = onward
        self._casting = casting
        self._seen = -1
        "The version of the room that `_tightest_s` and `_promised` were made of."
        self._promised = room.decodes.promised
        if casting is not None:
            this = weakref.proxy(self)  # else both would wait for the garbage collector
            casting.worth = lambda offer, part: this.of(offer, part)  # noqa: PLW0108  its method would hold it

    @functools.cached_property
    def _tightest_s(self) -> Floats:
        return np.empty((2, len(self._room.seats)))

    def weight(self, ticket: Ticket) -> float:
        """What keeping its promises counts, its tenant's standing included."""
        weight = ticket.promise.weight
        return weight if self._standing is None else weight * self._standing(ticket.request.tenant)

    @functools.cached_property
    def noise(self) -> Noise:
        """How far off the predicted pace may be."""
        return self._ask_noise()

    @functools.cached_property
    def _alone_s(self) -> float:
        """The fewest seconds per token that any slot is predicted to need, with nobody else there."""
        return float(self._room.decodes.load.alone_s.min())

    def allows(self, offer: Offer, total_s: Floats, *, part: float = 1.0) -> Bools | None:
        """The slots where it keeps more promises per token than it breaks, and nearly as many as on the best; None: all.

        Among them the earliest first token decides. With a profile its soft filters say which.

        Args:
            offer: what is to be put somewhere.
            total_s: seconds to its first token; `inf` where it cannot go now. Slots where that is late are left out, if
                it is in time on another.
            part: what its own promise counts here, 0 to 1.
        """
        if self._casting is not None:
            return self._casting.preferred(offer, total_s < math.inf, part)
        value = self.of(offer, part)
        if value is None:
            return None
        candidates = total_s < math.inf
        in_time = candidates & (total_s <= offer.ticket.due_at - self._now)
        value[~(in_time if in_time.any() else candidates)] = 0.0
        least = value.item(value.argmax()) - PACE_TIE
        if value[value.argmin()] > max(least, 0.0):
            return None
        worthy: Bools = (value > 0) & (value >= least)
        return worthy

    def allows_late(self, offer: Offer, total_s: Floats) -> Bools | None:
        """As `allows`, for one that is late: only where it breaks less than it counts, also of requests to come."""
        part, clear = self._settings.late_worth, self._settings.keep_clear
        if clear <= 0:
            return self.allows(offer, total_s, part=part)
        spares: Bools = clear * self._broken(offer) <= part * self.weight(offer.ticket)
        if self._casting is not None:  # what is better put is better than what it may have
            total_s = np.where(spares, total_s, math.inf)
        worthy = self.allows(offer, total_s, part=part)
        return spares if worthy is None else worthy & spares

    def of(self, offer: Offer, part: float = 1.0) -> Floats | None:
        """On each slot the odds that its own pace is kept, less what the others' odds fall, both by weight; None: nobody asks."""
        room, promise = self._room, offer.ticket.promise
        decodes, own_s = room.decodes, promise.tpot_s
        if self._settings.pace_worth <= 0 or (own_s is None and not decodes.is_bound):
            return None
        read_s = decodes.load.token_s * room.held_kv(offer.work.prompt, offer.kv)
        pace_s = decodes.joined_s(read_s)
        # What nobody keeps, not even alone, is no reason to be in one place rather than another.
        kept_s = None if own_s is None or own_s < self._alone_s else own_s
        gain, others = self._odds(kept_s, pace_s, is_urgent=offer.ticket.due_at < math.inf)
        if gain[gain.argmin()] < PACE_ODDS_MIN:
            gain[gain < PACE_ODDS_MIN] = 0.0
        if others is None:
            return gain
        left_s, weight = offer.ticket.due_at - self._now, part * self.weight(offer.ticket)
        if weight != 1.0:
            gain *= weight
        if left_s < math.inf and self._settings.patience > 0 and not offer.is_second:
            # Waiting costs it nothing but time, as long as it has more than its stay is long. Load comes and goes
            # within a few stays, so who may wait for several finds a place that costs others less.
            # The same for all: where it would stay longer is no better place.
            stay_s = room.mean(pace_s) * max(1, offer.ticket.output_tokens)
            gain *= min(1.0, self._settings.patience * stay_s / max(left_s, 1e-6))
        added_s = decodes.load.sequence_s + read_s
        work_s = offer.work_s / max(SHORT_ANSWER, offer.ticket.output_tokens)
        value: Floats = gain - self._harm(others, (added_s + work_s) / pace_s)
        if self._onward is not None and not offer.is_second:
            # A prefill leg is worth what its answer is where that would be decoded, beside which nobody prefills.
            target, _ = self._onward.target(offer.ticket)
            apart = gain - self._harm(others, added_s / pace_s)
            value[self._onward.is_prefill] = apart[target]
        return value

    def _odds(
        self, own_s: float | None, pace_s: Floats, *, is_urgent: bool
    ) -> tuple[Floats, Floats | None]:
        """At this pace, the odds of its own promise and of the tightest there; None: nobody there was promised any.

        A promise is a mean over the whole answer, so the others' is judged by the pace of late as well: as load rises
        they are ahead of it. Not for who is promised no first token, and loses nothing by waiting.
        Together, where both are asked for: numpy takes hardly longer for two rows than for one.
        """
        tightest_s, _ = self._bound()
        if not self._room.decodes.is_bound:
            # Whoever asks was promised a pace himself; a second leg comes to where nobody else was.
            gain = np.ones(len(pace_s)) if own_s is None else self.noise.odds(own_s, pace_s)
            return gain, None
        others_s = pace_s
        if is_urgent:
            others_s = pace_s + SAID * (self._room.decodes.load.lately_s - pace_s)
        if own_s is None:
            return np.ones(len(pace_s)), self.noise.odds(tightest_s[1], others_s)
        tightest_s[0] = own_s
        gain, others = self.noise.odds(tightest_s, np.array([pace_s, others_s]))
        return gain, others

    def _harm(self, odds: Floats, slower: Floats) -> Floats:
        """By slot, the worth of the others' promises per token that it would break, making all there slower by this part."""
        _, promised = self._bound()
        harm: Floats = promised * self.noise.fall(odds, slower)
        return harm

    def _bound(self) -> tuple[Floats, Floats]:
        """Two rows, its own promise (to be filled in) and the tightest there, and what the promises there are worth; by slot."""
        if self._seen != self._room.version:
            self._seen, decodes = self._room.version, self._room.decodes
            self._tightest_s[1] = np.minimum(decodes.tightest_s, PROMISE_MAX_S)
            self._promised = self._settings.pace_worth * decodes.promised
        return self._tightest_s, self._promised
