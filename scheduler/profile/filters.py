"""Where a request may go. What no profile can leave out (ready, model, role, length, seats, KV) the plan checks itself."""

import functools
import re
from collections.abc import Callable
from fnmatch import translate
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from scheduler.profile.fetchers import LATENCY, PREFIX_MATCH, WORTH
from scheduler.profile.parts import Filter
from scheduler.profile.scene import Scene
from scheduler.state import Bools
from scheduler.wire.worker import Beat

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]

WORTH_TIE = 0.1
"Places that gain so nearly as much as the best are left to the scores."


class Model(Filter, frozen=True, tag="model-filter"):
    """Endpoints that serve the model asked for."""

    def keep(self, scene: Scene, candidates: Bools) -> Bools:  # noqa: ARG002
        """By what the heartbeats name."""
        return _each(scene, lambda beat: scene.model in beat.models)


class Role(Filter, frozen=True, tag="role-filter"):
    """Endpoints of a role, or of all roles."""

    role: Literal["both", "prefill", "decode", "encode"] = "both"
    "`both` wants an endpoint that prefills and decodes."

    def keep(self, scene: Scene, candidates: Bools) -> Bools:  # noqa: ARG002
        """By what the heartbeats name."""
        wanted = {"prefill", "decode"} if self.role == "both" else {self.role}
        return _each(scene, lambda beat: "both" in beat.roles or wanted <= set(beat.roles))


class Label(Filter, frozen=True, tag="label-filter"):
    """Endpoints by what they call themselves."""

    by: Literal["endpoint", "hardware", "worker", "engine"]
    "A field of the heartbeat."

    allow: tuple[str, ...] = ("*",)
    "Shell patterns such as `h100*`; one must fit."

    deny: tuple[str, ...] = ()
    "None of these may fit."

    def keep(self, scene: Scene, candidates: Bools) -> Bools:  # noqa: ARG002
        """Allowed and not denied."""
        by, allowed, denied = self.by, _any_of(self.allow), _any_of(self.deny)
        return _each(
            scene,
            lambda beat: bool(allowed(getattr(beat, by))) and not denied(getattr(beat, by)),
        )


class Saturation(Filter, frozen=True, tag="saturation-filter"):
    """Endpoints that are not full: where all are, the request waits in the dispatcher."""

    kv_max: Share = 0.95
    "The most of its KV cache that may be given away."

    queue_max: Annotated[int, Meta(ge=0)] = 5
    "The most requests without first token."

    def keep(self, scene: Scene, candidates: Bools) -> Bools:  # noqa: ARG002
        """Both."""
        kept: Bools = (scene.kv_used <= self.kv_max) & (scene.queued <= self.queue_max)
        return kept


class PrefixAffinity(Filter, frozen=True, tag="prefix-cache-affinity-filter"):
    """Endpoints that hold enough of the prompt; where none does, or they lag too far behind, all."""

    threshold: Share = 0.8
    "Of the prompt."

    lag_s: Positive = 5.0
    "They are left when their best first token is so much later than anybody's."

    needs: ClassVar[tuple[str, ...]] = (PREFIX_MATCH, LATENCY)

    def keep(self, scene: Scene, candidates: Bools) -> Bools:
        """Sticky until saturated."""
        seconds = scene.data[LATENCY]
        warm = candidates & (scene.data[PREFIX_MATCH] >= self.threshold)
        best_s = seconds[candidates].min(initial=np.inf)
        return warm if seconds[warm].min(initial=np.inf) <= best_s + self.lag_s else candidates


class Pace(Filter, frozen=True, tag="pace-filter"):
    """Endpoints where it keeps more promises per token than it breaks, and nearly as many as at the best of them."""

    is_soft: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = (WORTH, LATENCY)

    def keep(self, scene: Scene, candidates: Bools) -> Bools:
        """Of those with room now, and of those in time if any is: no better pace is waited for into lateness."""
        worth = scene.data[WORTH]
        in_time = candidates & (scene.data[LATENCY] <= scene.left_s)
        if in_time.any():
            candidates = in_time
        least = worth[candidates].max(initial=0.0) - WORTH_TIE
        kept: Bools = candidates & (worth > 0) & (worth >= least)
        return kept


class InTime(Filter, frozen=True, tag="slo-filter"):
    """Endpoints that bring the first token in time; where none does, the one that brings it first."""

    is_soft: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = (LATENCY,)

    def keep(self, scene: Scene, candidates: Bools) -> Bools:
        """By prediction."""
        seconds = scene.data[LATENCY]
        kept: Bools = seconds <= max(scene.left_s, seconds[candidates].min(initial=np.inf))
        return kept


@functools.lru_cache(maxsize=256)
def _any_of(patterns: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    """Whether a text fits one of these; with none it fits nothing."""
    either = "|".join(translate(pattern) for pattern in patterns)
    return re.compile(either or r"(?!)").match


def _each(scene: Scene, test: Callable[[Beat], bool]) -> Bools:
    return np.array([beat is not None and test(beat) for beat in scene.beats], dtype=bool)


BUILT_IN = (Model, Role, Label, Saturation, PrefixAffinity, Pace, InTime)

AnyFilter = Model | Role | Label | Saturation | PrefixAffinity | Pace | InTime | Filter
