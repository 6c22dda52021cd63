"""How good each endpoint is, from 0 to 1. Names as in llm-d where it has the same; where ours knows more, it says so."""

from typing import Annotated, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from scheduler.externality import others_s
from scheduler.pressure import pressure
from scheduler.profile.fetchers import LATENCY, PREFIX_MATCH
from scheduler.profile.parts import Scorer
from scheduler.profile.scene import Scene
from scheduler.state import Bools, Floats

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]


class PrefixCache(Scorer, frozen=True, tag="prefix-cache-scorer"):
    """Part of the prompt in the endpoint's prefix cache."""

    needs: ClassVar[tuple[str, ...]] = (PREFIX_MATCH,)

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """The part."""
        return scene.data[PREFIX_MATCH]


class Queue(Scorer, frozen=True, tag="queue-scorer"):
    """Fewest requests without first token, between the most and the fewest of the candidates."""

    def score(self, scene: Scene, candidates: Bools) -> Floats:
        """1 for the fewest, 0 for the most; 1 where all have the same."""
        return _least(scene.queued, candidates)


class KvCache(Scorer, frozen=True, tag="kv-cache-utilization-scorer"):
    """Part of the KV cache that is free."""

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """The part."""
        return 1.0 - np.clip(scene.kv_used, 0.0, 1.0)


class KvPressure(Scorer, frozen=True, tag="kv-pressure-scorer"):
    """KV to spare: used in part it is hardly short, and what is cached is not asked for again."""

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """1 where none is in use or all of the prompt is cached, 0 where all is in use and nothing is cached."""
        used = np.clip(scene.kv_used, 0.0, 1.0)
        new = (scene.prompt_tokens - scene.cached_tokens) / scene.prompt_tokens
        is_promised = scene.left_s < np.inf or scene.tpot_s is not None
        return 1.0 - pressure(used, new, is_promised=is_promised, near=scene.pressed)


class Load(Scorer, frozen=True, tag="load-aware-scorer"):
    """Few requests in the queue, on a scale that does not depend on the others."""

    threshold: Positive = 128.0
    "Requests without first token from which on the score is 0."

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """0.5 with an empty queue, as in llm-d, falling to 0 at the threshold."""
        return 0.5 * (1.0 - np.minimum(scene.queued / self.threshold, 1.0))


class LeastRequest(Scorer, frozen=True, tag="running-requests-size-scorer"):
    """Fewest requests in flight, between the most and the fewest of the candidates."""

    def score(self, scene: Scene, candidates: Bools) -> Floats:
        """1 for the fewest, 0 for the most; 1 where all have the same."""
        return _least(scene.queued + scene.running, candidates)


class TokenLoad(Scorer, frozen=True, tag="token-load-scorer"):
    """Few uncached tokens before it: what requests weigh, not how many they are."""

    threshold_tokens: Positive = 4_194_304.0
    "Tokens from which on the score is 0."

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """1 with none."""
        return 1.0 - np.minimum(np.maximum(scene.queued_tokens, 0.0) / self.threshold_tokens, 1.0)


class PredictedLatency(Scorer, frozen=True, tag="predicted-latency-scorer"):
    """The earliest first token, by the learned cost model."""

    worst_s: Positive = 60.0
    """
    Seconds from which on the score is 0.

    The score falls evenly, so a weight of so many times `worst_s` counts each second so many times.
    """

    needs: ClassVar[tuple[str, ...]] = (LATENCY,)

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """1 for at once."""
        return 1.0 - np.minimum(scene.data[LATENCY], self.worst_s) / self.worst_s


class Externality(Scorer, frozen=True, tag="externality-scorer"):
    """What it costs others: those whom it joins there before their engine begins them, and those to come."""

    worst_s: Positive = 60.0
    "Seconds from which on the score is 0; as with `predicted-latency-scorer`."

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """1 where it costs nobody anything, and with a promise, whose request looks to that."""
        if scene.left_s < np.inf or scene.tpot_s is not None:
            return np.ones(scene.n_slots)
        new = (scene.prompt_tokens - scene.cached_tokens) / scene.prompt_tokens
        seconds = others_s(scene.prompt_tokens, scene.work_s, new, scene.unbegun)
        return 1.0 - np.minimum(seconds, self.worst_s) / self.worst_s


class SessionAffinity(Scorer, frozen=True, tag="session-affinity-scorer"):
    """Where this session was served last."""

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """1 there, 0 elsewhere; 0 everywhere without a session."""
        score = np.zeros(scene.n_slots)
        if scene.session_slot >= 0:
            score[scene.session_slot] = 1.0
        return score


class LoraAffinity(Scorer, frozen=True, tag="lora-affinity-scorer"):
    """Where the same model was used a moment ago: an adapter of an endpoint that serves many is loaded there."""

    keep_s: Positive = 60.0
    "An adapter unused for so long may have made room for others."

    def score(self, scene: Scene, candidates: Bools) -> Floats:  # noqa: ARG002
        """1 just after its use, falling to 0."""
        return 1.0 - np.minimum((scene.now - scene.model_at) / self.keep_s, 1.0)


class NoHitLru(Scorer, frozen=True, tag="no-hit-lru-scorer"):
    """Spreads prompts that nobody has cached: the endpoint first that had such a one longest ago."""

    needs: ClassVar[tuple[str, ...]] = (PREFIX_MATCH,)

    def score(self, scene: Scene, candidates: Bools) -> Floats:
        """By rank: 1 for the longest ago, 0 for the latest; 0.5 everywhere where somebody has part of the prompt."""
        if scene.data[PREFIX_MATCH][candidates].any():
            return np.full(scene.n_slots, 0.5)
        score = np.zeros(scene.n_slots)
        order = np.flatnonzero(candidates)[np.argsort(scene.cold_at[candidates], kind="stable")]
        score[order] = np.linspace(1.0, 0.0, len(order)) if len(order) > 1 else 1.0
        return score


class Cost(Scorer, frozen=True, tag="cost-scorer"):
    """The least money for its prefill, at a price for each class of hardware."""

    prices: dict[str, NotNegative] = msgspec.field(default_factory=dict)
    "An hour of each class, in any currency, by the name that the endpoint declares."

    price: NotNegative = 1.0
    "An hour of every other class."

    def score(self, scene: Scene, candidates: Bools) -> Floats:
        """1 for the cheapest, 0 for the dearest of the candidates; 1 where all cost the same."""
        hour = [
            0.0 if beat is None else self.prices.get(beat.hardware, self.price)
            for beat in scene.beats
        ]
        return _least(np.array(hour) * scene.work_s, candidates)


def _least(values: Floats, candidates: Bools) -> Floats:
    """1 for the least, 0 for the most of the candidates, in proportion between; 1 where they are equal."""
    seen = values[candidates]
    low, high = seen.min(initial=np.inf), seen.max(initial=-np.inf)
    if high <= low:
        return np.ones(len(values))
    score: Floats = np.clip((high - values) / (high - low), 0.0, 1.0)
    return score


BUILT_IN = (
    PrefixCache,
    Queue,
    KvCache,
    KvPressure,
    Load,
    LeastRequest,
    TokenLoad,
    PredictedLatency,
    Externality,
    SessionAffinity,
    LoraAffinity,
    NoHitLru,
    Cost,
)

AnyScorer = (
    PrefixCache
    | Queue
    | KvCache
    | KvPressure
    | Load
    | LeastRequest
    | TokenLoad
    | PredictedLatency
    | Externality
    | SessionAffinity
    | LoraAffinity
    | NoHitLru
    | Cost
    | Scorer
)
