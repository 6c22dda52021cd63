"""An example of a package with plug-ins of its own: it prefers endpoints that were used a moment ago.

Such a package's pyproject.toml says:

    [project.entry-points."headgate.plugins"]
    idle-fetcher = "warmth:Idle"
    warmth-scorer = "warmth:Warmth"
    newest-first = "warmth:NewestFirst"
"""

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from scheduler.policies import Policy
from scheduler.profile.parts import Fetcher, Scorer
from scheduler.profile.scene import Scene
from scheduler.state import Bools, Floats


class Idle(Fetcher, frozen=True, tag="idle-fetcher"):
    """Seconds since anything was handed over."""

    provides: ClassVar[str] = "idle-s"

    def fetch(self, scene: Scene) -> Floats:
        """At most an hour."""
        return np.minimum(scene.now - scene.given_at, 3600.0)


class Warmth(Scorer, frozen=True, tag="warmth-scorer"):
    """1 just after the last use, half of it each `half_s` later."""

    needs: ClassVar[tuple[str, ...]] = ("idle-s",)

    half_s: Annotated[float, Meta(gt=0)] = 30.0

    def score(self, scene: Scene, candidates: Bools) -> Floats:
        """For all alike."""
        return np.exp2(-scene.data["idle-s"] / self.half_s)


class NewestFirst(Policy, frozen=True, tag="newest-first"):
    """The latest goes first: unfair, and no policy that conforms."""

    def rank(self, *, enqueued_at: float, due_at: float, priority: int, work_s: float) -> float:
        """Falls with the arrival."""
        return -enqueued_at
