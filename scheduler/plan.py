"""Who starts where, in seconds: the rolling plan of one step.

    room  = for each endpoint, when it could begin something new, and what seats and KV it has left
    for each request, most urgent first:
        the endpoint where its first token comes earliest, by prediction
        too unlikely to be on time even there, for what its time is worth?   set aside
        would it start within the commit window?   hand it over
        else                                       keep the place for it, bind it later
    what the plan leaves idle takes a short one of those set aside

Nothing here changes a ticket or the ledger: the plan is a list of turns that the core then takes. It ends as soon
as no endpoint could start anything within the window, so a full fleet costs next to nothing.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np

from scheduler import explore
from scheduler.ledger import Line, chain
from scheduler.legs import Pledge
from scheduler.onward import Onward
from scheduler.openings import Openings
from scheduler.pace import Noise
from scheduler.policies import Terms
from scheduler.price import Usual
from scheduler.profile.casting import Casting
from scheduler.room import Offer, Room
from scheduler.state import Bools, Floats, Kept, Ticket
from scheduler.wire import Leg

ASIDE_MAX = 16
"The most that one step sets aside (I8); the next step, at once, goes on behind them."

IDLE_S = 1e-3
"An endpoint that could begin within this is idle."

BLOCKED_MAX = 16
"After so many who wait for a better pace, others who were promised one are not tried in this step (I8)."

PACE_ODDS_MIN = 0.1
"Below this chance to keep its pace a request gains nothing by being there."

PACE_TIE = 0.1
"Places that gain so nearly as much as the best are left to the earliest first token."

SHORT_ANSWER = 16
"The fewest tokens over which a stall for prefill is thought to be spread."

CANDIDATES = 5
"How many of the endpoints a decision's record names."


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the plan looks and how early it binds."""

    commit_window_s: float = 0.25
    """
    Only what starts within this many predicted seconds is handed over.

    What is handed over cannot give way any more. 0.1 leaves endpoints idle, 1 costs a point in overload.
    """

    horizon: int = 256
    "The most urgent requests that are considered together; a step goes on behind them only if all can go (I8)."

    pace_worth: float = 0.7
    """
    What the promises per token of those who decode already are worth beside a newcomer's own; 0: nobody asks.

    Where a newcomer would break more than it gains it is not put; where that is everywhere, it waits.
    """

    fill: float = 0.4
    """
    What an endpoint's full KV is worth beside an empty one, in predicted seconds to the first token; 0: nothing.

    It decodes more slowly for all, evicts prefixes that others come back for, and soon takes nobody.
    """

    tie: float = 0.02
    "Endpoints whose predicted first token differs by less than this part are taken as equal: chance decides."

    explore: float = 0.0
    """
    Scale of a draw on the predicted log seconds of those that could start now; 0: only equals are drawn.

    0.05 to 0.1 is what predictions do not know anyway. Every chance is then logged, for `headgate evaluate`.
    """

    explore_paid: float = 0.0
    "With `explore`: of the requests with slack, the part that takes any endpoint which makes it with room."


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A request and the endpoint that the plan gives it now."""

    ticket: Ticket
    slot: int
    line: Line
    "What the ledger is to hold."
    cached_tokens: int
    best_cached_tokens: int
    "On the endpoint that has the most and may take it."
    start_s: float
    "Predicted seconds until the endpoint begins it."
    work_s: float
    "Predicted seconds of the endpoint's time."
    total_s: float
    "Predicted seconds to its first token."
    ahead_tokens: float
    "Prefill before it, for the features."
    ahead_pairs: float
    propensity: float
    "With what chance this endpoint was taken."
    candidates: tuple[tuple[int, float], ...]
    "Slots and predicted seconds to the first token, best first."
    why: str
    weighed: tuple[tuple[int, float, float, int, float], ...] = ()
    "Where chance decided: slots, each one's chance, predicted wait, cached tokens and part of its KV in use."
    leg: Leg = "whole"
    onward_s: float = 0.0
    "Of a prefill leg, what of the seconds to its first token comes after it."
    pledge: Pledge | None = None
    "Of a prefill leg, the place kept for what comes after it."
    features: tuple[str, ...] = ()
    "Of a decode leg, what the predictor of transfers saw."


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the plan sets aside or takes up again."""

    kind: Literal["set_aside", "take_up"]
    ticket: Ticket
    total_s: float
    "Predicted seconds to its first token on its best endpoint."


Cached = Callable[[Ticket], Floats | None]
"A request's cached tokens on every slot; None: nobody has any."

Barrier = Callable[[Ticket], Floats]
"0 for each slot where a request may go, `inf` where not."

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
        cached: Cached,
        barrier: Barrier,
        noise: Callable[[], Noise],
        rng: np.random.Generator,
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
            cached: prefix cache of a request.
            barrier: eligibility of a request.
            noise: how far off the predicted pace may be; asked once, if ever.
            rng: decides between equals.
            casting: a profile that says where and which; None: the plan's own choice.
            onward: what follows a prefill leg; None where nobody only prefills.
        """
        self.room = room
        self.now = now
        self.settings = settings
        self.terms = terms
        self.cached = cached
        self.barrier = barrier
        self.rng = rng
        self.casting = casting
        if casting is not None:
            casting.worth = self._worth
        self.onward = onward
        if onward is not None:
            room.only_prefills = onward.is_prefill
        self.odds = odds
        self.usual = usual
        self._asking: Sequence[Ticket] = ()
        self._offers: dict[str, Offer] = {}
        "Of those who are tried again: they were priced a moment ago."
        self._ask_noise = noise
        self.choices: list[Choice] = []
        self.turns: list[Turn] = []
        "Who is to be set aside, and who after all is not."
        self.is_cut = False
        "Whether it stopped only because it had set enough aside for one step."
        self._chances: Floats | None = None
        "Of the draw that the next hand-over follows from; None: nothing was drawn."
        self._blocked = 0
        "How many were found no place in which they gain more than they break."
        self.is_exhausted = False
        "Whether all of the line was considered: what is idle then, nobody urgent wants."

    @functools.cached_property
    def waits(self) -> float:
        """How much waits for each endpoint, in requests of the usual size."""
        return self.usual.waits(self._asking, self.room)

    @functools.cached_property
    def noise(self) -> Noise:
        """How far off the predicted pace may be."""
        return self._ask_noise()

    def serve(self, line: Sequence[Ticket]) -> None:
        """Plan these, most urgent first, until nothing more could start within the window."""
        self._asking = line
        self.is_exhausted = False
        openings = Openings(
            line, self.room, barrier=self.barrier, within_s=self.settings.commit_window_s
        )
        for at, ticket in enumerate(line):
            if at > openings.last():
                return
            if self._blocked >= BLOCKED_MAX and ticket.promise.tpot_s is not None:
                continue
            if len(self.turns) >= ASIDE_MAX:
                self.is_cut = True
                return
            self._place(self._offers.get(ticket.id) or self._price(ticket))
        self.is_exhausted = True

    def hopeful(self, aside: Sequence[Ticket]) -> list[Ticket]:
        """Who of those set aside could make it alone, by the plain prediction: worth another place in the plan."""
        if not self.room.can_start(self.settings.commit_window_s):
            return []
        earliest_s = self.room.earliest_s
        found = []
        for ticket in aside:
            left_s = ticket.due_at - self.now
            if left_s <= earliest_s:
                continue
            offer = self._price(ticket)
            if np.minimum.reduce(self.room.open_s + offer.service_s) <= left_s:
                found.append(ticket)
                self._offers[ticket.id] = offer
        return found

    def fill(self, aside: Sequence[Ticket], *, is_calm: bool) -> None:
        """Give what the plan leaves idle to these, in their order.

        Args:
            aside: set aside, shortest first.
            is_calm: nobody urgent waits. Otherwise only what is shorter than the window is let in, since it
                cannot be interrupted.
        """
        for ticket in aside:
            idle = (self.room.open_s <= IDLE_S) & ~self.room.reserved
            if self.onward is not None:
                idle &= self.onward.is_idle()
            if not idle.any():
                return
            offer = self._price(ticket)
            worthy = self._worthy(offer, idle)
            if worthy is not None:
                idle &= worthy
            total_s = np.where(idle, self._total_s(offer), np.inf)
            slot = int(total_s.argmin())
            if total_s[slot] == math.inf:
                return
            if is_calm or offer.work_s[slot] <= self.settings.commit_window_s:
                self._hand_over(offer, slot, total_s, 1.0, "late, on an endpoint that is idle")

    def serve_aged(self, ticket: Ticket) -> None:
        """Give one that was set aside its share, whatever its chances, if it could start now."""
        offer = self._price(ticket)
        total_s = self._total_s(offer)
        slot = int(total_s.argmin())
        if total_s[slot] < math.inf and self._starts_now(slot):
            self._hand_over(offer, slot, total_s, 1.0, "late, its turn by the aside share")

    def decode(self, ticket: Ticket, kept: Kept, source: int) -> None:
        """Bind the second leg of one whose prompt is computed, where its pace is kept and it begins soonest.

        Where it would break more than it gains it waits a little, for as long as it can and its KV is sure to be there.
        """
        assert self.onward is not None
        offer = self.onward.second_leg(self._price_whole(ticket), source)
        total_s = self._total_s(offer)
        best = int(total_s.argmin())
        if total_s[best] == math.inf:
            return
        worthy = self._worthy(offer)
        if worthy is not None and not worthy.all():
            worthy_s = np.where(worthy, total_s, np.inf)
            kept_slot = int(worthy_s.argmin())
            patient_until_at = min(kept.patient_until_at, ticket.due_at - float(total_s[best]))
            if worthy_s[kept_slot] < math.inf:
                total_s, best = worthy_s, kept_slot
            elif self.now < patient_until_at:
                return
        slot, propensity, why = self._pick(offer, total_s, best)
        self._hand_over(offer, slot, total_s, propensity, why)

    def _place(self, offer: Offer) -> None:
        total_s = self._total_s(offer)
        best = int(total_s.argmin())
        if total_s[best] == math.inf:
            self._wait_for_room(offer)
            return
        can_make_it = self._can_make_it(offer, total_s, best)
        worthy = self._worthy(offer)
        if worthy is not None and not worthy.all():
            worthy_s = np.where(worthy, total_s, np.inf)
            kept = int(worthy_s.argmin())
            if worthy_s[kept] < math.inf:
                total_s, best = worthy_s, kept
            elif can_make_it:
                self._blocked += offer.ticket.promise.tpot_s is not None
                return
        if can_make_it == (
            offer.ticket.state == "set_aside"
        ):  # a change; a test without one says nothing
            kind: Literal["set_aside", "take_up"] = "take_up" if can_make_it else "set_aside"
            self.turns.append(Turn(kind=kind, ticket=offer.ticket, total_s=float(total_s[best])))
        if not can_make_it:
            return
        slot, propensity, why = self._pick(offer, total_s, best)
        if self._starts_now(slot):
            self._hand_over(offer, slot, total_s, propensity, why)
        else:
            self.room.reserve(slot, float(offer.work_s[slot]), self._line(offer, slot))

    def _pick(self, offer: Offer, total_s: Floats, best: int) -> tuple[int, float, str]:
        """The slot, with what chance it was taken, and why."""
        left_s = offer.ticket.due_at - self.now
        if self.casting is not None:
            return self.casting.pick(offer, total_s < math.inf, self.rng)
        score_s = total_s + self.settings.fill * self._used(offer)
        if self.onward is not None and not offer.is_second:
            score_s += self.onward.stalls_s(offer)
        if left_s < math.inf:
            # Who is promised a first token pays for others only out of its slack.
            score_s[total_s > max(left_s, float(total_s[best]))] = math.inf
        cheapest = int(score_s.argmin())
        why = "earliest first token" if cheapest == best else "a little later, where more is free"
        if self.settings.explore > 0:
            slot, propensity = self._explored(total_s, score_s, cheapest, left_s)
            return slot, propensity, f"{why}, drawn" if propensity < 1 else why
        near = (score_s <= score_s[cheapest] * (1.0 + self.settings.tie)).nonzero()[0]
        if len(near) == 1:
            return cheapest, 1.0, why
        drawn = int(self.rng.random() * len(near))
        return int(near[drawn]), 1.0 / len(near), f"{why}, one of {len(near)} equals"

    def _explored(
        self, total_s: Floats, score_s: Floats, cheapest: int, left_s: float
    ) -> tuple[int, float]:
        """A draw among the nearest that could start now: whoever must wait is drawn again until it need not."""
        window_s = self.settings.commit_window_s
        open_ = np.zeros(len(total_s), dtype=bool)
        near = total_s.argsort(kind="stable")[:CANDIDATES]
        open_[near] = self.room.start_s[near] <= window_s
        if not open_[cheapest]:
            return cheapest, 1.0
        chances = explore.chances(np.where(open_, score_s, np.inf), scale=self.settings.explore)
        chances = explore.paid(
            chances, total_s, open_, left_s=left_s, share=self.settings.explore_paid
        )
        self._chances = chances
        slot = explore.drawn(chances, self.rng.random())
        return slot, float(chances[slot])

    def _weighed(
        self, offer: Offer, candidates: Sequence[tuple[int, float]]
    ) -> tuple[tuple[int, float, float, int, float], ...]:
        """What an off-policy estimate wants to know of each candidate; nothing where nothing was drawn."""
        chances, self._chances = self._chances, None
        if chances is None:
            return ()
        used = self._used(offer)
        cached = np.zeros(len(used)) if offer.cached is None else offer.cached
        return tuple(
            (
                slot,
                float(chances[slot]),
                float(self.room.start_s[slot]),
                int(cached[slot]),
                float(used[slot]),
            )
            for slot, _ in candidates
        )

    def _used(self, offer: Offer) -> Floats:
        """The part of KV given away where its answer would be decoded."""
        used = self.room.used
        if self.onward is not None and not offer.is_second:
            used = used.copy()
            used[self.onward.is_prefill] = used[self.onward.target(offer.ticket)[0]]
        return used

    def _leg(self, offer: Offer, slot: int) -> Leg:
        if self.onward is None:
            return "whole"
        if offer.is_second:
            return "decode"
        return "prefill" if self.onward.is_prefill[slot] else "whole"

    def _hand_over(
        self, offer: Offer, slot: int, total_s: Floats, propensity: float, why: str
    ) -> None:
        line, leg = self._line(offer, slot), self._leg(offer, slot)
        pledge, onward_s = None, 0.0
        features: tuple[str, ...] = ()
        if self.onward is not None and leg == "prefill":
            target, onward_s = self.onward.target(offer.ticket)
            pledge = Pledge(target, min(offer.kv, float(self.room.kv_max[target])))
        elif self.onward is not None and leg == "decode":
            features = self.onward.features(offer, slot)
        cached = best_cached = 0.0
        if offer.cached is not None:
            cached = min(float(offer.cached[slot]), offer.prompt - 1.0)
            open_to_it = offer.cached[np.isfinite(offer.service_s)]
            best_cached = min(float(open_to_it.max()), offer.prompt - 1.0)
        work_s = float(offer.work_s[slot])
        candidates = _best(total_s)
        self.choices.append(
            Choice(
                ticket=offer.ticket,
                slot=slot,
                line=line,
                cached_tokens=int(cached),
                best_cached_tokens=int(best_cached),
                start_s=float(self.room.start_s[slot]),
                work_s=work_s,
                total_s=float(total_s[slot]),
                ahead_tokens=float(self.room.tokens[slot]),
                ahead_pairs=float(self.room.pairs[slot]),
                propensity=propensity,
                candidates=candidates,
                weighed=self._weighed(offer, candidates),
                why=why,
                leg=leg,
                onward_s=onward_s,
                pledge=pledge,
                features=features,
            )
        )
        self.room.take(slot, work_s, line)
        if self.casting is not None:
            self.casting.took(offer, slot)
        if pledge is not None:
            self.room.pledge(pledge.slot, pledge.kv)

    def _total_s(self, offer: Offer) -> Floats:
        """Predicted seconds to its first token; `inf` where it may not go or finds no room now."""
        total_s: Floats = self.room.open_s + offer.service_s
        if self.room.is_tight(offer.kv):
            self.room.keep_out(offer, total_s)
        return total_s

    def _wait_for_room(self, offer: Offer) -> None:
        """It fits nowhere now. The endpoint that suits it best is kept from those behind it, so that it empties.

        Otherwise small requests would keep every endpoint too full for a large one for ever.
        """
        slot = int((self.room.start_s + offer.service_s).argmin())
        if offer.service_s[slot] < math.inf:
            self.room.shut(slot)

    def _can_make_it(self, offer: Offer, total_s: Floats, best: int) -> bool:
        """Whether its chance to be on time on its best endpoint is worth that endpoint's time."""
        ticket, terms = offer.ticket, self.terms
        if terms.odds_min <= 0 or ticket.due_at == math.inf:
            return True
        left_s = ticket.due_at - self.now
        if left_s <= 0:
            return False
        predicted_s = float(total_s[best])
        odds = self.odds(float(self.room.backlog_s[best]), math.log(left_s / predicted_s))
        if odds < terms.odds_min:
            return False
        if terms.price <= 0:
            return True
        promised_s = ticket.due_at - ticket.enqueued_at
        others = self.waits
        if ticket.state != "set_aside":
            others -= self.usual.share(ticket, self.room)
        asked = terms.price * others * float(offer.work_s[best]) / promised_s
        return odds * ticket.promise.weight >= asked

    def _worthy(self, offer: Offer, candidates: Bools | None = None) -> Bools | None:
        """Where it gains more than it breaks, and nearly as much as anywhere; None: nobody asks.

        The earliest first token decides among them. A profile says so itself of these candidates, or of all.
        """
        if self.casting is not None:
            open_ = self._total_s(offer) < math.inf
            return self.casting.wishes(offer, open_ if candidates is None else open_ & candidates)
        value = self._worth(offer)
        if value is None:
            return None
        best = np.maximum.reduce(value, where=offer.service_s < math.inf, initial=0.0)
        worthy: Bools = (value > 0) & (value >= best - PACE_TIE)
        return worthy

    def _worth(self, offer: Offer) -> Floats | None:
        """What it gains less what it breaks: the odds of its own pace against what it takes from the others'."""
        room, promise = self.room, offer.ticket.promise
        if self.settings.pace_worth <= 0 or (promise.tpot_s is None and not room.decodes.is_bound):
            return None
        kv = self.room.held_kv(offer.prompt, offer.kv)
        pace_s = room.decodes.pace_s(kv)
        gain = np.ones(len(pace_s))
        if promise.tpot_s is not None and promise.tpot_s >= room.decodes.load.alone_s.min():
            gain = self.noise.odds(promise.tpot_s, pace_s)
            gain[gain < PACE_ODDS_MIN] = 0.0
        gain = promise.weight * gain
        value = gain - self._harm(offer.work_s, offer, kv, pace_s)
        if self.onward is not None and not offer.is_second:
            # A prefill leg is worth what its answer is where that would be decoded, beside which nobody prefills.
            target, _ = self.onward.target(offer.ticket)
            apart = gain - self._harm(0.0, offer, kv, pace_s)
            value[self.onward.is_prefill] = apart[target]
        worth: Floats = value
        return worth

    def _harm(self, work_s: Floats | float, offer: Offer, kv: Floats, pace_s: Floats) -> Floats:
        """What the promises per token of those who are there are worth that it would break, with so many seconds of prefill."""
        decodes = self.room.decodes
        added_s = decodes.load.sequence_s + decodes.load.token_s * kv
        added_s = added_s + work_s / max(SHORT_ANSWER, offer.ticket.output_tokens)
        broken = self.noise.harm(np.minimum(decodes.tightest_s, 1e3), pace_s, added_s / pace_s)
        harm: Floats = self.settings.pace_worth * decodes.promised * broken
        return harm

    def _line(self, offer: Offer, slot: int) -> Line:
        """What the ledger is to hold; a promise per token that cannot be kept there binds nobody."""
        prompt, own_s = offer.prompt, offer.ticket.promise.tpot_s
        kv = min(offer.kv, float(self.room.kv_max[slot]))
        leg = self._leg(offer, slot)
        if leg == "prefill":
            kv, own_s = min(kv, prompt + 1.0), None
        keeps = (
            own_s is not None
            and own_s >= self.room.decodes.pace_s(self.room.held_kv(offer.prompt, offer.kv))[slot]
        )
        tokens = prompt
        if offer.cached is not None:
            tokens -= min(float(offer.cached[slot]), prompt - 1.0)
        if leg == "decode":
            tokens = 0.0
        return Line(
            tokens=tokens,
            pairs=tokens * (prompt - 0.5 * tokens),
            kv=kv,
            tpot_s=own_s if own_s is not None and keeps else math.inf,
            weight=offer.ticket.promise.weight,
            blocks=chain(offer.ticket.request.blocks, kv),
        )

    def _starts_now(self, slot: int) -> bool:
        return bool(self.room.start_s[slot] <= self.settings.commit_window_s)

    def _price(self, ticket: Ticket) -> Offer:
        """What it would cost on every slot, all that follows a prefill leg included."""
        offer = self._price_whole(ticket)
        if self.onward is not None:
            offer = self.onward.reach(offer)
        return offer if self.casting is None else self.casting.narrowed(offer)

    def _price_whole(self, ticket: Ticket) -> Offer:
        """What it would cost on every slot to serve it, or as much of it as that slot serves."""
        rates = self.room.rates
        cached = self.cached(ticket)
        prompt = float(max(1, ticket.prompt_tokens))
        if cached is None:
            work_s = prompt * rates.token_s + (0.5 * prompt * prompt) * rates.pair_s
        else:
            tokens = prompt - np.minimum(cached, prompt - 1.0)
            pairs = tokens * (prompt - 0.5 * tokens)
            work_s = tokens * rates.token_s + pairs * rates.pair_s
        service_s = work_s + rates.overhead_s + self.barrier(ticket)
        if prompt > self.room.length_least:
            service_s[prompt > self.room.length_max] = math.inf
        kv = prompt + float(ticket.output_tokens)
        return Offer(ticket, prompt, kv, cached, work_s, service_s)


def _best(total_s: Floats) -> tuple[tuple[int, float], ...]:
    """The slots of the shortest, with their seconds, best first."""
    order = total_s.argsort(kind="stable")[:CANDIDATES]
    pairs = zip(order.tolist(), total_s[order].tolist(), strict=True)
    return tuple(pair for pair in pairs if pair[1] < math.inf)
