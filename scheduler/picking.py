"""Which of the endpoints a request takes: soon is good, KV to spare is good, and chance decides between equals."""

import functools
import math

import numpy as np

from scheduler import explore
from scheduler.externality import others_s
from scheduler.onward import Onward
from scheduler.plan import PlanSettings
from scheduler.pressure import pressure
from scheduler.profile.casting import Casting
from scheduler.room import Room
from scheduler.state import Bools, Floats
from scheduler.work import Offer

CANDIDATES = 5
"How many of the endpoints a decision's record names: the nearest, and whoever else chance could have taken."

DRAWABLE_MAX = 16
"Of those whom chance could have taken, how many a decision's record names; the likeliest."


class Picker:
    """Made for one step, with its room."""

    def __init__(
        self,
        room: Room,
        *,
        now: float,
        settings: PlanSettings,
        rng: np.random.Generator,
        onward: Onward | None,
        casting: Casting | None,
    ) -> None:
        """Pick by these; a profile (`casting`) picks itself."""
        self._room = room
        self._now = now
        self._settings = settings
        self._fill = _array(settings.fill)
        self._near = 1.0 + settings.tie
        self._rng = rng
        self._onward = onward
        self._casting = casting
        self._chances: Floats | None = None
        "Of the draw that the next hand-over follows from; None: nothing was drawn."

    def pick(self, offer: Offer, total_s: Floats, best: int) -> tuple[int, float, str]:
        """The slot, with what chance it was taken, and why."""
        left_s = offer.ticket.due_at - self._now
        if self._casting is not None:
            return self._cast(self._casting, offer, total_s < math.inf)
        score_s = total_s + self._fill * self._pressure(offer)
        others_s = self._others_s(offer)
        if others_s is not None and self._settings.externality > 0:
            score_s += self._settings.externality * others_s
        if self._onward is not None and not offer.is_second:
            score_s += self._onward.stalls_s(offer)
        if left_s < math.inf:
            # Who is promised a first token pays for others only out of its slack.
            limit_s = max(left_s, total_s.item(best))
            if total_s.item(total_s.argmax()) > limit_s:
                score_s[total_s > limit_s] = math.inf
        cheapest = int(score_s.argmin())
        why = "earliest first token" if cheapest == best else "a little later, where more is free"
        if self._settings.explore > 0:
            slot, propensity = self._explored(total_s, score_s, cheapest, left_s)
            return slot, propensity, f"{why}, drawn" if propensity < 1 else why
        [near] = (score_s <= score_s.item(cheapest) * self._near).nonzero()
        if len(near) == 1:
            return cheapest, 1.0, why
        drawn = int(self._rng.random() * len(near))
        return near.item(drawn), 1.0 / len(near), f"{why}, one of {len(near)} equals"

    def _cast(self, casting: Casting, offer: Offer, open_: Bools) -> tuple[int, float, str]:
        """A draw by the chances of a profile's picker: whoever must wait is drawn again until it need not."""
        chances, scores = casting.chances(offer, open_)
        is_sure = chances.max() == 1.0
        slot = int(chances.argmax()) if is_sure else explore.drawn(chances, self._rng.random())
        why = f"{casting.label}: score {scores[slot]:.3f}, best {scores.max():.3f}"
        handed = chances
        if not offer.is_second:
            handed = chances * (self._room.start_s <= self._settings.commit_window_s)
        if handed[slot] and not is_sure:
            self._chances = _of_named(handed, slot)
        return slot, float(chances[slot]), why

    def _explored(
        self, total_s: Floats, score_s: Floats, cheapest: int, left_s: float
    ) -> tuple[int, float]:
        """A draw among the nearest that could start now: whoever must wait is drawn again until it need not."""
        window_s = self._settings.commit_window_s
        open_ = np.zeros(len(total_s), dtype=bool)
        near = nearest(total_s)
        open_[near] = self._room.start_s[near] <= window_s
        if not open_[cheapest]:
            return cheapest, 1.0
        if self._room.probed is not None:
            open_ &= ~self._room.probed
            open_[cheapest] = True
        chances = explore.chances(np.where(open_, score_s, np.inf), scale=self._settings.explore)
        chances = explore.paid(
            chances, total_s, open_, left_s=left_s, share=self._settings.explore_paid
        )
        self._chances = chances
        slot = explore.drawn(chances, self._rng.random())
        return slot, float(chances[slot])

    def weighed(
        self, offer: Offer, total_s: Floats
    ) -> tuple[tuple[int, float, float, int, float, float], ...]:
        """What an off-policy estimate wants to know of each that a record names; nothing where nothing was drawn."""
        chances, self._chances = self._chances, None
        if chances is None:
            return ()
        order = total_s.argsort(kind="stable")
        is_named = chances[order] > 0
        is_named[:CANDIDATES] = True
        pressed, others_s = self._pressure(offer), self._others_s(offer)
        cached = np.zeros(len(pressed)) if offer.work.cached is None else offer.work.cached
        return tuple(
            (
                slot,
                float(chances[slot]),
                float(self._room.start_s[slot]),
                int(cached[slot]),
                float(pressed[slot]),
                0.0 if others_s is None else float(others_s[slot]),
            )
            for slot in order[is_named].tolist()
            if total_s[slot] < math.inf
        )

    def _others_s(self, offer: Offer) -> Floats | None:
        """What taking the time of each costs others in seconds; None: it was promised something, and looks to that."""
        promise = offer.ticket.promise
        if offer.ticket.due_at < math.inf or promise.tpot_s is not None or offer.is_second:
            return None
        return others_s(offer.work.prompt, offer.work_s, offer.work.new, self._room.unbegun)

    def _pressure(self, offer: Offer) -> Floats:
        """What giving KV away costs, where its answer would be decoded."""
        used = self._room.used
        ticket = offer.ticket
        tpot_s = ticket.promise.tpot_s
        is_promised = ticket.due_at < math.inf or tpot_s is not None
        near = 1.0 if tpot_s is None else self._room.pressed(tpot_s)
        new = None if is_promised else offer.work.new
        pressed = pressure(used, new, is_promised=is_promised, near=near)
        if self._onward is not None and not offer.is_second:
            # To whoever decodes what is prefilled elsewhere, all of it is new.
            target, _ = self._onward.target(ticket)
            apart = pressure(used[target : target + 1], None, is_promised=is_promised)
            pressed = np.where(self._onward.is_prefill, apart, pressed)
        return pressed


def nearest(total_s: Floats) -> list[int]:
    """The slots with the earliest first tokens, best first."""
    found: list[int] = total_s.argsort(kind="stable")[:CANDIDATES].tolist()
    return found


@functools.lru_cache(maxsize=16)
def _array(number: float) -> Floats:
    """As an array: numpy takes as long again to make one of a number."""
    return np.array(number)


def _of_named(chances: Floats, slot: int) -> Floats | None:
    """Of those that a record can name; None where the one taken is not among them.

    Whom a record names must not hang on who was drawn: an estimate made from such records would be biased.
    """
    if np.count_nonzero(chances) > DRAWABLE_MAX:
        chances = chances.copy()
        chances[chances.argsort(kind="stable")[:-DRAWABLE_MAX]] = 0.0
    share: Floats = chances / chances.sum()
    return share if share[slot] else None
