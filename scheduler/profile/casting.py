"""A profile at work within one step of the plan.

The plan asks four things of it, in this order, for each request: where it may go (`narrowed`), where it is better put
(`preferred`), with what chance each of what is left is taken (`chances`); and it is told which was taken (`took`). All
else stays the plan's: the order of the line, feasibility, reservations and late binding, seats and KV.
"""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from scheduler.profile import fetchers
from scheduler.profile.fetchers import WORTH
from scheduler.profile.parts import Fetcher, Filter
from scheduler.profile.profile import Profile
from scheduler.profile.scene import Scene
from scheduler.profile.trail import Trail
from scheduler.room import Room
from scheduler.state import Bools, Endpoint, Floats
from scheduler.work import Offer

T = TypeVar("T", bound=np.generic)

SUM_ERROR_MAX = 1e-6
"By how much a picker's chances may miss 1: the dust of as many divisions as there are slots."

Worth = Callable[[Offer, float], Floats | None]
"Promises kept less broken on each slot, as the plan reckons them, its own counting so much; None: nobody was promised any."


class Assembly:
    """A profile's parts by what they do, and what outlives a step."""

    def __init__(self, profile: Profile) -> None:
        """Make ready; what no part reads is not fetched."""
        self.hard = [part for part in profile.filters if not part.is_soft]
        self.soft = [part for part in profile.filters if part.is_soft]
        self.scorers = [part for part in profile.scorers if part.weight > 0]
        self.picker = profile.picker
        self.trail = Trail()
        self.fetchers = _needed(profile)
        used = (*self.hard, *self.soft, *self.scorers, self.picker, *self.fetchers)
        self.needs_worth = any(WORTH in part.needs for part in used)
        self.total = sum(part.weight for part in self.scorers)

    def scores(self, scene: Scene, candidates: Bools) -> Floats:
        """The weighted mean of the scorers; `-inf` for who is no candidate."""
        total = np.zeros(scene.n_slots)
        for part in self.scorers:
            total += (part.weight / self.total) * part.score(scene, candidates)
        scores: Floats = np.where(candidates, total if self.scorers else 1.0, -np.inf)
        assert not np.isnan(scores).any(), f"a scorer of {self.scorers} says nan, wanted 0 to 1"
        return scores

    def chances(self, scene: Scene, scores: Floats) -> Floats:
        """With what chance the picker takes each."""
        chances = self.picker.chances(scene, read_only(scores))
        told = f"{self.picker} says {chances} of {scores}"
        assert not chances[scores == -np.inf].any(), f"{told}, wanted 0 where the score is -inf"
        assert abs(float(chances.sum()) - 1.0) < SUM_ERROR_MAX, f"{told}, wanted a sum of 1"
        return chances

    def kept(self, filters: Sequence[Filter], scene: Scene, candidates: Bools) -> Bools:
        """What these leave, one after the other."""
        for part in filters:
            if not candidates.any():
                break
            candidates = candidates & part.keep(scene, read_only(candidates))
        return candidates


class Casting:
    """One step: it sees the room as the choices before have left it."""

    def __init__(
        self,
        assembly: Assembly,
        room: Room,
        *,
        by_slot: Sequence[Endpoint | None],
        seats_max: Floats,
        decoding: Floats,
        now: float,
    ) -> None:
        """Begin a step.

        Args:
            assembly: the profile.
            room: what the endpoints can take.
            by_slot: who stands where.
            seats_max: float64[n_slots], what each has when nobody is there.
            decoding: float64[n_slots], requests that decode.
            now: unix seconds.
        """
        self._assembly = assembly
        self._room = room
        self._beats = tuple(None if e is None else e.beat for e in by_slot)
        self._seats_max = seats_max
        self._decoding = read_only(decoding)
        self._now = now
        self.worth = nothing_promised
        "Set by the planner that it works for; asked only where a part reads it."
        self._scene: tuple[Offer, Scene] | None = None
        assembly.trail.meet([e.name if e else "" for e in by_slot])

    def narrowed(self, offer: Offer) -> Offer:
        """The offer without the slots that the profile's hard filters close."""
        scene = self._seen(offer)
        kept = self._assembly.kept(self._assembly.hard, scene, scene.eligible)
        if not np.array_equal(kept, scene.eligible):
            offer = structs.replace(offer, service_s=np.where(kept, offer.service_s, np.inf))
            first_s = np.where(kept, scene.first_token_s, np.inf)
            scene = structs.replace(
                scene, eligible=read_only(kept), first_token_s=read_only(first_s)
            )
        self._scene = offer, scene
        return offer

    def preferred(self, offer: Offer, candidates: Bools, part: float) -> Bools:
        """Of these slots, where it is better put, if its own promise counts so much, 0 to 1."""
        is_whole = part == 1.0 or not self._assembly.needs_worth
        scene = self._of(offer) if is_whole else self._seen(offer, part)
        return self._assembly.kept(self._assembly.soft, scene, candidates)

    def chances(self, offer: Offer, candidates: Bools) -> tuple[Floats, Floats]:
        """With what chance each is taken, and the scores that say so; float64[n_slots] both."""
        scene = self._of(offer)
        scores = self._assembly.scores(scene, candidates)
        return self._assembly.chances(scene, scores), scores

    @property
    def label(self) -> str:
        """The picker's name."""
        return self._assembly.picker.label

    def took(self, offer: Offer, slot: int) -> None:
        """It is handed over there."""
        request, cached = offer.ticket.request, offer.work.cached
        self._assembly.trail.add(
            slot,
            model=request.model,
            session=request.session,
            is_cold=cached is None or not cached[slot],
            now=self._now,
        )

    def _of(self, offer: Offer) -> Scene:
        """The scene of this very offer; one that was not narrowed (a second leg) gets its own."""
        if self._scene is None or self._scene[0] is not offer:
            self._scene = offer, self._seen(offer)
        return self._scene[1]

    def _seen(self, offer: Offer, part: float = 1.0) -> Scene:
        ticket, room, trail = offer.ticket, self._room, self._assembly.trail
        request, promise = ticket.request, ticket.promise
        running = self._decoding
        cached = np.zeros(len(room.kv)) if offer.work.cached is None else offer.work.cached
        bare = Scene(
            id=ticket.id,
            model=request.model,
            tenant=request.tenant,
            session=request.session,
            priority=promise.priority,
            weight=promise.weight,
            prompt_tokens=offer.work.prompt,
            output_tokens=float(ticket.output_tokens),
            left_s=ticket.due_at - self._now,
            tpot_s=promise.tpot_s,
            pressed=room.pressed(promise.tpot_s),
            beats=self._beats,
            eligible=read_only(offer.service_s < math.inf),
            work_s=read_only(offer.work_s),
            first_token_s=read_only(room.open_s + offer.service_s),
            cached_tokens=read_only(np.minimum(cached, offer.work.prompt - 1.0)),
            busy_s=read_only(room.start_s),
            queued=read_only(np.maximum(self._seats_max - room.seats - running, 0.0)),
            unbegun=read_only(room.unbegun),
            queued_tokens=read_only(room.tokens),
            running=running,
            kv_used=read_only(room.used),
            session_slot=trail.session_slot(request.session) if request.session else -1,
            given_at=read_only(trail.given_at),
            cold_at=read_only(trail.cold_at),
            model_at=read_only(trail.model_at(request.model)),
            now=self._now,
            data=MappingProxyType({}),
        )
        return fetched(self._assembly.fetchers, bare, self._columns(offer, part))

    def _columns(self, offer: Offer, part: float) -> dict[str, Floats]:
        if not self._assembly.needs_worth:
            return {}
        value = self.worth(offer, part)
        return {WORTH: read_only(np.ones(len(self._beats)) if value is None else value)}


def nothing_promised(offer: Offer, part: float) -> Floats | None:  # noqa: ARG001
    """What a request is worth where nobody was promised a pace."""
    return None


def fetched(parts: Sequence[Fetcher], scene: Scene, columns: dict[str, Floats]) -> Scene:
    """The scene with these fetchers' columns, each seeing those before it."""
    scene = structs.replace(scene, data=MappingProxyType(columns))
    for part in parts:
        columns[part.provides] = read_only(part.fetch(scene))
    return scene


def read_only(values: NDArray[T]) -> NDArray[T]:
    """The same array, not to be written through this name."""
    view = values.view()
    view.flags.writeable = False
    return view


def _needed(profile: Profile) -> list[Fetcher]:
    """The built-in fetchers that are not replaced, then the profile's own; only those that somebody reads."""
    own = {part.provides: part for part in profile.fetchers}
    line = [kind() for kind in fetchers.BUILT_IN if kind.provides not in own] + list(own.values())
    read = {c for p in (*profile.filters, *profile.scorers, profile.picker) for c in p.needs}
    kept = []
    for part in reversed(line):
        if part.provides in read:
            kept.append(part)
            read.update(part.needs)
    return kept[::-1]
