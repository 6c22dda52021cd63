"""Who starts where, in seconds: the rolling plan of one step.

    room  = for each endpoint, when it could begin something new, and what seats and KV it has left
    for each request, most urgent first:
        the endpoint where its first token comes earliest, by prediction
        too unlikely to be on time even there, for what its time is worth?   set aside
        would it start within the commit window?   hand it over
        else                                       keep the place for it, bind it later
    what the plan leaves idle takes a short one of those set aside

Nothing here changes a ticket or the ledger: the plan is two lists, choices and asides, that the core makes true. It ends as soon
as nobody of the line could start anything within the window, so a full fleet costs next to nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from scheduler import affinity, cost
from scheduler.ledger import Line, chain
from scheduler.legs import Pledge
from scheduler.offers import Offers
from scheduler.onward import Onward
from scheduler.openings import Openings
from scheduler.pace import Noise
from scheduler.picking import Picker
from scheduler.plan import Aside, Choice, PlanSettings
from scheduler.policies import Terms
from scheduler.price import Usual
from scheduler.profile.casting import Casting
from scheduler.room import Room
from scheduler.state import Floats, Kept, Ticket
from scheduler.wire.words import Leg
from scheduler.work import Offer, Work
from scheduler.worth import Worth

ASIDE_MAX = 8
"The most requests that one step sets aside (I8); the next step follows at once and goes on behind them."

IDLE_S = 1e-3
"An endpoint that could begin within this is idle."

KEPT_MAX = 16
"Of the requests that wait for room, how many keep the endpoint that suits them best from those set aside."

BLOCKED_MAX = 16
"Where so many requests wait for a better pace, no more are tried in this step (I8); counted apart with and without a TPOT promise."

Odds = Callable[[float, float], float]
"The chance that log(actual / predicted) is no more than the second, for one that stands behind the first in seconds."


class Planner:
    """One step's plan, made and then forgotten."""

    def __init__(
        self,
        room: Room,
        *,
        now: float,
        settings: PlanSettings,
        terms: Terms,
        odds: Odds,
        usual: Usual,
        work: Callable[[Ticket], Work],
        barrier: Callable[[str], Floats],
        noise: Callable[[], Noise],
        broken: Callable[[Offer], Floats],
        rng: np.random.Generator,
        standing: Callable[[str], float] | None = None,
        onward: Onward | None = None,
        casting: Casting | None = None,
    ) -> None:
        """Plan with this room.

        Args:
            room: what the endpoints can take; used up.
            now: unix seconds.
            settings: how far and how early.
            terms: what the policy asks.
            odds: how far predictions are off.
            usual: the size of requests, to price one by.
            work: what is left to compute of a request.
            barrier: by model, 0 for each slot where a request may go, `inf` where not.
            noise: how far off the predicted pace may be; asked once, if ever.
            broken: by slot, how many of those to come one that is late would probably make late there.
            rng: decides between equals.
            standing: by tenant, what its promises count; None: all alike.
            onward: what follows a prefill leg; None where nobody only prefills.
            casting: a profile that says where and which; None: the plan's own choice.
        """
        self.room = room
        self._now = now
        self._settings = settings
        self._terms = terms
        self._barrier = barrier
        self._casting = casting
        self.onward = onward
        if onward is not None:
            room.only_prefills = onward.is_prefill
        self._odds = odds
        self._usual = usual
        self.offers = Offers(room, work=work, barrier=barrier, onward=onward, casting=casting)
        self.worth = Worth(
            room,
            settings=settings,
            noise=noise,
            standing=standing,
            broken=broken,
            now=now,
            onward=onward,
            casting=casting,
        )
        self._picker = Picker(
            room, now=now, settings=settings, rng=rng, onward=onward, casting=casting
        )
        self.choices: list[Choice] = []
        self.asides: list[Aside] = []
        "Who is to be set aside, and who after all is not."
        self.for_pace: list[Ticket] = []
        "Requests that found no endpoint where they gain more than they break, and those behind them that were not tried."
        self.has_tried = False
        "Whether anybody of the line was considered."
        self.is_cut = False
        "Whether it stopped only because it had set enough aside for one step."
        self.is_exhausted = False
        "Whether all of the line was considered."
        self.waits_until_at = math.inf
        "When the first of the requests that wait for their cached prefix goes elsewhere, unix seconds."
        self._asking: Sequence[Ticket] = ()
        self._waits: float | None = None
        self._passed_over: Sequence[Ticket] = ()
        "The first of the line for whom there is no room."
        self._known: dict[str, Offer] = {}
        "Offers made by `hopeful`, by request id: those requests are tried again in this step."
        self._blocked = [0, 0]
        "How many of `for_pace` were tried: without a promise per token, and with one."

    @property
    def waits(self) -> float:
        """How much waits for each endpoint, in requests of the usual size, made out when first asked for."""
        if self._waits is None:
            self._waits = self._usual.waits(self._asking, self.room)
        return self._waits

    def serve(self, line: Sequence[Ticket]) -> None:
        """Plan these, most urgent first, until nothing more could start within the window."""
        self._asking = line
        self._passed_over = ()
        self.is_exhausted = False
        openings = self._openings(line)
        for at, ticket in enumerate(line):
            if at > openings.last():
                self._passed_over = line[at : at + KEPT_MAX]
                return
            if self._blocked[ticket.promise.tpot_s is not None] >= BLOCKED_MAX:
                self.for_pace.append(ticket)
                continue
            if len(self.asides) >= ASIDE_MAX:
                self.is_cut = True
                return
            self.has_tried = True
            self._place(self._known.get(ticket.id) or self.offers.of(ticket))
        self.is_exhausted = True

    def hopeful(self, aside: Sequence[Ticket]) -> list[Ticket]:
        """Those of the set aside whose plain prediction is in time somewhere: they are planned again."""
        if self._openings(aside).last() < 0:
            return []
        earliest_s = self.room.earliest_s
        found = []
        for ticket in aside:
            left_s = ticket.due_at - self._now
            if left_s <= earliest_s:
                continue
            offer = self.offers.of(ticket)
            total_s = self.room.open_s + offer.service_s
            if total_s[total_s.argmin()] <= left_s:
                found.append(ticket)
                self._known[ticket.id] = offer
        return found

    def has_idle(self) -> bool:
        """Whether the plan leaves anybody idle."""
        return self.room.can_start(IDLE_S)

    def fill(self, aside: Sequence[Ticket], *, is_calm: bool) -> None:
        """Give what the plan leaves idle to these, in their order.

        Args:
            aside: set aside, shortest first.
            is_calm: nobody urgent waits. Otherwise only what is shorter than the window is let in, since it
                cannot be interrupted.
        """
        for ticket in self._passed_over:
            self._keep_place(self.offers.of(ticket))
        for ticket in aside:
            idle = self.room.open_s <= IDLE_S
            idle[list(self.room.reserved)] = False
            if self.onward is not None:
                idle &= self.onward.is_idle()
            if not idle.any():
                return
            offer = self.offers.of(ticket)
            total_s = np.where(idle, self.offers.total_s(offer), np.inf)
            worthy = self.worth.allows_late(offer, total_s)
            if worthy is not None:
                total_s = np.where(worthy, total_s, np.inf)
            slot = int(total_s.argmin())
            if total_s[slot] == math.inf:
                return
            if is_calm or offer.work_s[slot] <= self._settings.commit_window_s:
                self._hand_over(offer, slot, total_s, 1.0, "late, on an endpoint that is idle")

    def serve_aged(self, ticket: Ticket) -> None:
        """Hand over one that was set aside, whatever its chances, if it can start now."""
        offer = self.offers.of(ticket)
        total_s = self.offers.total_s(offer)
        slot = int(total_s.argmin())
        if total_s[slot] < math.inf and self._starts_now(slot):
            self._hand_over(offer, slot, total_s, 1.0, "late, its turn by the aside share")

    def decode(self, ticket: Ticket, kept: Kept, source: int) -> None:
        """Bind the second leg of one whose prompt is computed, where its pace is kept and it begins soonest.

        Where it would break more than it gains it waits a little, for as long as it can and its KV is sure to be there.
        """
        assert self.onward is not None
        offer = self.onward.second_leg(self.offers.whole(ticket), source)
        total_s = self.offers.total_s(offer)
        best = int(total_s.argmin())
        if total_s[best] == math.inf:
            return
        worthy = self.worth.allows(offer, total_s)
        if worthy is not None and not worthy.all():
            worthy_s = np.where(worthy, total_s, np.inf)
            kept_slot = int(worthy_s.argmin())
            patient_until_at = min(kept.patient_until_at, ticket.due_at - float(total_s[best]))
            if worthy_s[kept_slot] < math.inf:
                total_s, best = worthy_s, kept_slot
            elif self._now < patient_until_at:
                return
        slot, propensity, why = self._picker.pick(offer, total_s, best)
        self._hand_over(offer, slot, total_s, propensity, why)

    def _openings(self, line: Sequence[Ticket]) -> Openings:
        within_s = self._settings.commit_window_s
        return Openings(line, self.room, barrier=self._barrier, within_s=within_s)

    def _place(self, offer: Offer) -> None:
        total_s = self.offers.total_s(offer)
        best = int(total_s.argmin())
        if total_s.item(best) == math.inf:
            self._wait_for_room(offer)
            return
        until_at = affinity.waits_until(
            offer, total_s, best, room=self.room, patience=self._settings.cache_patience
        )
        if self._now < until_at:
            self.waits_until_at = min(self.waits_until_at, until_at)
            return
        can_make_it = self._can_make_it(offer, total_s, best)
        worthy = self.worth.allows(offer, total_s)
        if worthy is not None and not worthy[worthy.argmin()]:
            worthy_s = np.where(worthy, total_s, np.inf)
            kept = int(worthy_s.argmin())
            if worthy_s[kept] < math.inf:
                total_s, best = worthy_s, kept
            elif can_make_it:
                self._blocked[offer.ticket.promise.tpot_s is not None] += 1
                self.for_pace.append(offer.ticket)
                return
        is_aside = offer.ticket.state == "set_aside"
        if can_make_it == is_aside:  # a change
            kind: Literal["set_aside", "take_up"] = "take_up" if can_make_it else "set_aside"
            aside = Aside(kind, offer.ticket, total_s=total_s.item(best), alone_s=offer.alone_s)
            self.asides.append(aside)
        if not can_make_it:
            return
        slot, propensity, why = self._picker.pick(offer, total_s, best)
        if self._starts_now(slot):
            self._hand_over(offer, slot, total_s, propensity, why)
        else:
            tokens = offer.tokens(slot)
            pairs = cost.pairs(tokens, offer.work.prompt)
            self.room.reserve(slot, offer.work_s.item(slot), tokens=tokens, pairs=pairs)

    def _leg(self, offer: Offer, slot: int) -> Leg:
        if self.onward is None:
            return "whole"
        if offer.is_second:
            return "decode"
        return "prefill" if self.onward.is_prefill[slot] else "whole"

    def _hand_over(
        self, offer: Offer, slot: int, total_s: Floats, propensity: float, why: str
    ) -> None:
        leg = self._leg(offer, slot)
        line = self._line(offer, slot, leg)
        pledge, onward_s = None, 0.0
        features: tuple[str, ...] = ()
        if self.onward is not None and leg == "prefill":
            target, onward_s = self.onward.target(offer.ticket)
            pledge = Pledge(target, min(offer.kv, float(self.room.kv_max[target])))
        elif self.onward is not None and leg == "decode":
            features = self.onward.features(offer, slot)
        cached, best_cached = offer.best_cached(slot)
        work_s = offer.work_s.item(slot)
        self.choices.append(
            Choice(
                ticket=offer.ticket,
                slot=slot,
                line=line,
                cached_tokens=int(cached),
                best_cached_tokens=int(best_cached),
                start_s=self.room.start_s.item(slot),
                work_s=work_s,
                total_s=total_s.item(slot),
                ahead_tokens=self.room.tokens.item(slot),
                ahead_pairs=self.room.pairs.item(slot),
                propensity=propensity,
                everywhere_s=total_s,
                weighed=self._picker.weighed(offer, total_s),
                why=why,
                leg=leg,
                onward_s=onward_s,
                pledge=pledge,
                features=features,
            )
        )
        self.room.take(slot, work_s, line)
        if self._casting is not None:
            self._casting.took(offer, slot)
        if pledge is not None:
            self.room.pledge(pledge.slot, pledge.kv)

    def _keep_place(self, offer: Offer) -> None:
        """Whatever suits it best is not for those set aside."""
        total_s = self.offers.total_s(offer)
        slot = int(total_s.argmin())
        if total_s[slot] < math.inf:
            self.room.reserved[slot] = None
        else:
            self._wait_for_room(offer)

    def _wait_for_room(self, offer: Offer) -> None:
        """It fits nowhere now: keep the endpoint that suits it best from those behind it.

        Else small requests could keep every endpoint too full for a large one for ever.
        """
        slot = int((self.room.start_s + offer.service_s).argmin())
        if offer.service_s[slot] < math.inf:
            self.room.shut(slot)

    def _can_make_it(self, offer: Offer, total_s: Floats, best: int) -> bool:
        """Whether its chance to be on time on its best endpoint is worth that endpoint's time."""
        ticket, terms = offer.ticket, self._terms
        if terms.odds_min <= 0 or ticket.due_at == math.inf:
            return True
        left_s = ticket.due_at - self._now
        if left_s <= 0:
            return False
        predicted_s = total_s.item(best)
        odds = self._odds(self.room.backlog_s.item(best), math.log(left_s / predicted_s))
        if odds < terms.odds_min:
            return False
        if terms.price <= 0:
            return True
        promised_s = ticket.due_at - ticket.enqueued_at
        others = self.waits - self._usual.share(ticket, self.room)
        asked = terms.price * others * offer.work_s.item(best) / promised_s
        return odds * self.worth.weight(ticket) >= asked

    def _line(self, offer: Offer, slot: int, leg: Leg) -> Line:
        """What the ledger is to hold; a promise per token that cannot be kept there binds nobody."""
        prompt, own_s = offer.work.prompt, offer.ticket.promise.tpot_s
        kv = min(offer.kv, self.room.kv_max.item(slot))
        if leg == "prefill":
            kv, own_s = min(kv, prompt + 1.0), None
        keeps = (
            own_s is not None
            and own_s >= self.room.decodes.pace_s(self.room.held_kv(prompt, offer.kv))[slot]
        )
        tokens = offer.tokens(slot)
        return Line(
            tokens=tokens,
            pairs=cost.pairs(tokens, prompt),
            kv=kv,
            tpot_s=own_s if own_s is not None and keeps else math.inf,
            weight=self.worth.weight(offer.ticket),
            begins_at=self._now + self.room.start_s.item(slot),
            blocks=chain(offer.ticket.request.blocks, kv),
        )

    def _starts_now(self, slot: int) -> bool:
        return self.room.start_s.item(slot) <= self._settings.commit_window_s
