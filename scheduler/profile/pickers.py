"""Who of those left is taken, and with what chance: off-policy estimates stand on these propensities."""

from typing import Annotated

import numpy as np
from msgspec import Meta

from scheduler.profile.parts import Pick, Picker
from scheduler.profile.scene import Scene
from scheduler.state import Floats


class MaxScore(Picker, frozen=True, tag="max-score-picker"):
    """The highest score; chance decides between equals."""

    tie: Annotated[float, Meta(ge=0)] = 0.0
    "Who lacks at most this part more of a perfect score than the best does is its equal; 0: equal scores only."

    def pick(self, scene: Scene, scores: Floats, rng: np.random.Generator) -> Pick:  # noqa: ARG002
        """One of the best, each with the same chance."""
        lack = 1.0 - scores
        near = (lack <= lack.min() * (1.0 + self.tie)).nonzero()[0]
        return _any(near, rng)


class WeightedRandom(Picker, frozen=True, tag="weighted-random-picker"):
    """Anybody, with a chance in proportion to the score."""

    def pick(self, scene: Scene, scores: Floats, rng: np.random.Generator) -> Pick:  # noqa: ARG002
        """Where all scores are 0, each with the same chance."""
        open_ = np.isfinite(scores).nonzero()[0]
        weights = scores[open_]
        total = float(weights.sum())
        if total <= 0:
            return _any(open_, rng)
        at = int(np.searchsorted(np.cumsum(weights), rng.random() * total, side="right"))
        at = min(at, int(weights.nonzero()[0][-1]))  # the sum's last bit may be missing
        return Pick(int(open_[at]), float(weights[at]) / total)


class Random(Picker, frozen=True, tag="random-picker"):
    """Anybody, whatever the scores."""

    def pick(self, scene: Scene, scores: Floats, rng: np.random.Generator) -> Pick:  # noqa: ARG002
        """Each with the same chance."""
        return _any(np.isfinite(scores).nonzero()[0], rng)


class RoundRobin(Picker, frozen=True, tag="round-robin-picker"):
    """Whoever was given nothing for the longest, whatever the scores."""

    def pick(self, scene: Scene, scores: Floats, rng: np.random.Generator) -> Pick:  # noqa: ARG002
        """The first of those never given anything, then the oldest."""
        slots = np.isfinite(scores).nonzero()[0]
        return Pick(int(slots[scene.given_at[slots].argmin()]), 1.0)


def _any(slots: np.ndarray[tuple[int], np.dtype[np.intp]], rng: np.random.Generator) -> Pick:
    if len(slots) == 1:
        return Pick(int(slots[0]), 1.0)
    return Pick(int(slots[int(rng.random() * len(slots))]), 1.0 / len(slots))


BUILT_IN = (MaxScore, WeightedRandom, Random, RoundRobin)

AnyPicker = MaxScore | WeightedRandom | Random | RoundRobin | Picker
