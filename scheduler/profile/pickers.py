"""With what chance each of those left is taken: exact, so that off-policy estimates can stand on them."""

from typing import Annotated

import numpy as np
from msgspec import Meta

from scheduler.profile.parts import Picker
from scheduler.profile.scene import Scene
from scheduler.state import Bools, Floats


class MaxScore(Picker, frozen=True, tag="max-score-picker"):
    """The highest score; chance decides between equals."""

    tie: Annotated[float, Meta(ge=0)] = 0.0
    "Who lacks at most this part more of a perfect score than the best does is its equal; 0: equal scores only."

    def chances(self, scene: Scene, scores: Floats) -> Floats:  # noqa: ARG002
        """One of the best, each with the same chance."""
        lack = 1.0 - scores
        return _evenly(lack <= lack.min() * (1.0 + self.tie))


class WeightedRandom(Picker, frozen=True, tag="weighted-random-picker"):
    """Anybody, with a chance in proportion to the score."""

    def chances(self, scene: Scene, scores: Floats) -> Floats:  # noqa: ARG002
        """Where all scores are 0, each with the same chance."""
        open_ = np.isfinite(scores)
        weights = np.where(open_, scores, 0.0)
        total = float(weights.sum())
        return weights / total if total > 0 else _evenly(open_)


class Random(Picker, frozen=True, tag="random-picker"):
    """Anybody, whatever the scores."""

    def chances(self, scene: Scene, scores: Floats) -> Floats:  # noqa: ARG002
        """Each with the same chance."""
        return _evenly(np.isfinite(scores))


class RoundRobin(Picker, frozen=True, tag="round-robin-picker"):
    """Whoever was given nothing for the longest, whatever the scores."""

    def chances(self, scene: Scene, scores: Floats) -> Floats:
        """The first of those never given anything, then the oldest."""
        since = np.where(np.isfinite(scores), scene.given_at, np.inf)
        return _evenly(np.arange(len(scores)) == since.argmin())


def _evenly(slots: Bools) -> Floats:
    share: Floats = slots / np.count_nonzero(slots)
    return share


BUILT_IN = (MaxScore, WeightedRandom, Random, RoundRobin)

AnyPicker = MaxScore | WeightedRandom | Random | RoundRobin | Picker
