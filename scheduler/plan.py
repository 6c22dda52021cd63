"""Who starts where, in seconds: the rolling plan of one step.

    room  = for each endpoint, when it could begin something new, and what seats and KV it has left
    for each request, most urgent first:
        the endpoint where its first token comes earliest, by prediction
        too unlikely to be on time even there?     set aside
        would it start within the commit window?   hand it over
        else                                       keep the place for it, bind it later
    what the plan leaves idle takes a short one of those set aside

Nothing here changes a ticket or the ledger: the plan is a list of turns that the core then takes. It ends as soon
as no endpoint could start anything within the window, so a full fleet costs next to nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np

from scheduler import cost
from scheduler.ledger import Line, chain
from scheduler.pace import Noise
from scheduler.policies import Terms
from scheduler.prefix import BLOCK_TOKENS
from scheduler.room import Offer, Room
from scheduler.state import Bools, Floats, Ticket

CHUNK = 4
"Requests priced at once to begin with, then twice as many each time: most plans end after a few."

PRICED_MAX = 64
"The most priced at once."

ASIDE_MAX = 32
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

    commit_window_s: float = 1.0
    "Only what starts within this many predicted seconds is handed over. 1 s is free, 3 s costs 4 points."

    horizon: int = 256
    "The most urgent requests that one step considers (I8)."

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


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the plan sets aside or takes up again."""

    kind: Literal["set_aside", "take_up"]
    ticket: Ticket
    total_s: float
    "Predicted seconds to its first token on its best endpoint."


Pricer = Callable[[Ticket], tuple[Floats, Floats]]
"A request's cached tokens on every slot, and its barrier: 0 where it may go, `inf` where not."


class Planner:
    """One step's plan, made and then forgotten."""

    def __init__(
        self,
        room: Room,
        *,
        now: float,
        settings: PlanSettings,
        terms: Terms,
        spread: Floats,
        pricer: Pricer,
        noise: Noise,
        rng: np.random.Generator,
    ) -> None:
        """Plan with this room.

        Args:
            room: what the endpoints can take; used up.
            now: unix seconds.
            settings: how far and how early.
            terms: what the policy asks.
            spread: float64[n_slots], by what factor the lucky `odds_min` part of requests beats its prediction.
            pricer: prefix cache and eligibility of a request.
            noise: how far off the predicted pace may be.
            rng: decides between equals.
        """
        self.room = room
        self.now = now
        self.settings = settings
        self.terms = terms
        self.spread = spread
        self.pricer = pricer
        self.noise = noise
        self.rng = rng
        self.choices: list[Choice] = []
        self.turns: list[Turn] = []
        "Who is to be set aside, and who after all is not."
        self.is_cut = False
        "Whether it stopped only because it had set enough aside for one step."
        self._blocked = 0
        "How many were found no place in which they gain more than they break."
        self.is_exhausted = False
        "Whether all of the line was considered: what is idle then, nobody urgent wants."

    def serve(self, line: Sequence[Ticket]) -> None:
        """Plan these, most urgent first, until nothing more could start within the window."""
        for offer in self._offers(line):
            if not self.room.can_start(self.settings.commit_window_s):
                return
            if len(self.turns) >= ASIDE_MAX:
                self.is_cut = True
                return
            self._place(offer)
        self.is_exhausted = True

    def hopeful(self, aside: Sequence[Ticket]) -> list[Ticket]:
        """Who of those set aside could make it alone, by the plain prediction: worth another place in the plan."""
        young = [ticket for ticket in aside if ticket.due_at > self.now]
        if not young or not self.room.can_start(self.settings.commit_window_s):
            return []
        offers = self._price(young[:PRICED_MAX])
        open_s = self.room.start_s + self.room.shut_s
        best_s = (open_s + np.array([offer.service_s for offer in offers])).min(axis=1)
        return [
            o.ticket for o, s in zip(offers, best_s, strict=True) if s <= o.ticket.due_at - self.now
        ]

    def fill(self, aside: Sequence[Ticket], *, is_calm: bool) -> None:
        """Give what the plan leaves idle to these, in their order.

        Args:
            aside: set aside, shortest first.
            is_calm: nobody urgent waits. Otherwise only what is shorter than the window is let in, since it
                cannot be interrupted.
        """
        for offer in self._offers(aside):
            idle = (self.room.start_s <= IDLE_S) & ~self.room.reserved
            worthy = self._worthy(offer)
            if worthy is not None:
                idle &= worthy
            total_s = np.where(idle, self._total_s(offer), np.inf)
            slot = int(total_s.argmin())
            if not np.isfinite(total_s[slot]):
                return
            if is_calm or offer.work_s[slot] <= self.settings.commit_window_s:
                self._hand_over(offer, slot, total_s, 1.0, "late, on an endpoint that is idle")

    def serve_aged(self, ticket: Ticket) -> None:
        """Give one that was set aside its share, whatever its chances, if it could start now."""
        for offer in self._offers([ticket]):
            total_s = self._total_s(offer)
            slot = int(total_s.argmin())
            if np.isfinite(total_s[slot]) and self._starts_now(slot):
                self._hand_over(offer, slot, total_s, 1.0, "late, its turn by the aside share")

    def _place(self, offer: Offer) -> None:
        total_s = self._total_s(offer)
        best = int(total_s.argmin())
        if not np.isfinite(total_s[best]):
            self._wait_for_room(offer)
            return
        can_make_it = self._can_make_it(offer.ticket, total_s)
        worthy = self._worthy(offer)
        if worthy is not None and not worthy.all():
            worthy_s = np.where(worthy, total_s, np.inf)
            kept = int(worthy_s.argmin())
            if np.isfinite(worthy_s[kept]):
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
        if left_s - float(total_s[best]) > self.terms.best_fit_slack_s:
            fits = np.where(total_s / self.spread <= left_s, total_s, -np.inf)
            fits[~np.isfinite(total_s)] = -np.inf
            return int(fits.argmax()), 1.0, "patient: the slowest endpoint that makes it"
        # Who is promised a first token pays for others only out of its slack.
        score_s = total_s + self.settings.fill * self.room.used
        late = total_s > max(left_s, float(total_s[best]))
        score_s[late] = np.inf
        cheapest = int(score_s.argmin())
        why = "earliest first token" if cheapest == best else "a little later, where more is free"
        near = np.flatnonzero(score_s <= score_s[cheapest] * (1.0 + self.settings.tie))
        if len(near) == 1:
            return cheapest, 1.0, why
        drawn = int(self.rng.random() * len(near))
        return int(near[drawn]), 1.0 / len(near), f"{why}, one of {len(near)} equals"

    def _hand_over(
        self, offer: Offer, slot: int, total_s: Floats, propensity: float, why: str
    ) -> None:
        line = self._line(offer, slot)
        self.choices.append(
            Choice(
                ticket=offer.ticket,
                slot=slot,
                line=line,
                cached_tokens=int(offer.cached[slot]),
                best_cached_tokens=int(offer.cached[np.isfinite(offer.service_s)].max()),
                start_s=float(self.room.start_s[slot]),
                work_s=float(offer.work_s[slot]),
                total_s=float(total_s[slot]),
                ahead_tokens=float(self.room.tokens[slot]),
                ahead_pairs=float(self.room.pairs[slot]),
                propensity=propensity,
                candidates=_best(total_s),
                why=why,
            )
        )
        self.room.take(slot, float(offer.work_s[slot]), line)

    def _total_s(self, offer: Offer) -> Floats:
        total_s: Floats = self.room.start_s + self.room.shut_s + offer.service_s
        tight = self.room.kv < offer.kv
        if tight.any():
            for slot in np.flatnonzero(tight & np.isfinite(total_s)):
                if self.room.kv[slot] < self._kv_needed(offer, int(slot)):
                    total_s[slot] = np.inf
        return total_s

    def _kv_needed(self, offer: Offer, slot: int) -> float:
        """KV tokens it would take there, beside what others hold for it."""
        own = chain(offer.ticket.request.blocks, offer.kv[slot])
        return float(offer.kv[slot]) - BLOCK_TOKENS * self.room.pins.depth(slot, own)

    def _wait_for_room(self, offer: Offer) -> None:
        """It fits nowhere now. The endpoint that suits it best is kept from those behind it, so that it empties.

        Otherwise small requests would keep every endpoint too full for a large one for ever.
        """
        slot = int((self.room.start_s + offer.service_s).argmin())
        if np.isfinite(offer.service_s[slot]):
            self.room.shut_s[slot] = np.inf

    def _can_make_it(self, ticket: Ticket, total_s: Floats) -> bool:
        """Whether its chance to be on time on its best endpoint is at least the policy's `odds_min`."""
        if self.terms.odds_min <= 0 or not np.isfinite(ticket.due_at):
            return True
        return bool((total_s * self.spread).min() <= ticket.due_at - self.now)

    def _worthy(self, offer: Offer) -> Bools | None:
        """Where it gains more than it breaks: the odds of its own pace against what it takes from the others'.

        Of those places only the ones near the best; the earliest first token decides among them. None: nobody asks.
        """
        room, promise = self.room, offer.ticket.promise
        if self.settings.pace_worth <= 0 or (promise.tpot_s is None and not room.decodes.is_bound):
            return None
        pace_s = room.decodes.pace_s(offer.kv)
        gain = np.ones(len(pace_s))
        if promise.tpot_s is not None and promise.tpot_s >= room.decodes.load.alone_s.min():
            gain = self.noise.odds(promise.tpot_s, pace_s)
            gain[gain < PACE_ODDS_MIN] = 0.0
        value = promise.weight * gain - self._harm(offer, pace_s)
        worthy: Bools = (value > 0) & (
            value >= value[np.isfinite(offer.service_s)].max(initial=0.0) - PACE_TIE
        )
        return worthy

    def _harm(self, offer: Offer, pace_s: Floats) -> Floats:
        """How many promises per token of those who are there it would break."""
        decodes = self.room.decodes
        added_s = decodes.load.sequence_s + decodes.load.token_s * offer.kv
        added_s = added_s + offer.work_s / max(SHORT_ANSWER, offer.ticket.output_tokens)
        broken = self.noise.harm(np.minimum(decodes.tightest_s, 1e3), pace_s, added_s / pace_s)
        harm: Floats = self.settings.pace_worth * decodes.promised * broken
        return harm

    def _line(self, offer: Offer, slot: int) -> Line:
        """What the ledger is to hold; a promise per token that cannot be kept there binds nobody."""
        own_s = offer.ticket.promise.tpot_s
        keeps = own_s is not None and own_s >= self.room.decodes.pace_s(offer.kv)[slot]
        return Line(
            tokens=float(offer.tokens[slot]),
            pairs=float(offer.pairs[slot]),
            kv=float(offer.kv[slot]),
            tpot_s=own_s if own_s is not None and keeps else math.inf,
            blocks=chain(offer.ticket.request.blocks, offer.kv[slot]),
        )

    def _starts_now(self, slot: int) -> bool:
        return bool(self.room.start_s[slot] <= self.settings.commit_window_s)

    def _offers(self, tickets: Sequence[Ticket]) -> Iterator[Offer]:
        at, count = 0, CHUNK
        while at < len(tickets):
            chunk = tickets[at : at + count]
            if self._blocked >= BLOCKED_MAX:
                chunk = [ticket for ticket in chunk if ticket.promise.tpot_s is None]
            yield from self._price(chunk)
            at, count = at + count, min(2 * count, PRICED_MAX)

    def _price(self, tickets: Sequence[Ticket]) -> list[Offer]:
        """Price a chunk at once: arrays are float64[n_tickets, n_slots]."""
        if not tickets:
            return []
        rates = self.room.rates
        priced = [self.pricer(ticket) for ticket in tickets]
        prompt = np.array([[float(max(1, t.prompt_tokens))] for t in tickets])
        output = np.array([[float(t.output_tokens)] for t in tickets])
        cached = np.minimum(np.array([row for row, _ in priced]), prompt - 1.0)
        barrier = np.array([row for _, row in priced])
        tokens = prompt - cached
        pairs = cost.attention(tokens, prompt)
        work_s = tokens * rates.token_s + pairs * rates.pair_s
        service_s = work_s + rates.overhead_s + barrier
        service_s[prompt > self.room.length_max] = np.inf
        kv = np.minimum(prompt + output, self.room.kv_max)
        return [
            Offer(t, cached[i], tokens[i], pairs[i], work_s[i], service_s[i], kv[i])
            for i, t in enumerate(tickets)
        ]


def _best(total_s: Floats) -> tuple[tuple[int, float], ...]:
    order = np.argsort(total_s, kind="stable")[:CANDIDATES]
    return tuple((int(slot), float(total_s[slot])) for slot in order if np.isfinite(total_s[slot]))
