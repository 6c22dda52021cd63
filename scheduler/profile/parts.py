"""What a profile is made of. A part is a frozen Struct; its tag is its name, its fields are its settings.

    Fetcher   makes a column that several other parts read      -> float64[n_slots]
    Filter    says where the request may go                     -> bool[n_slots]
    Scorer    says how good each endpoint is                    -> float64[n_slots], 0 (worst) to 1 (best)
    Picker    says whom chance may take, given their mean score -> float64[n_slots], chances

A part is pure: the same scene gives the same answer, nothing is written, nothing is remembered, nothing is drawn.
What a part wants to know of the past stands in the scene. Work on arrays: a part runs for every request placed.
`tests/conformance.py` checks all of this; docs/PLUGINS.md shows how to write one.
"""

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from scheduler.profile.scene import Scene
from scheduler.state import Bools, Floats


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"):
    """What all parts have."""

    needs: ClassVar[tuple[str, ...]] = ()
    "Columns of `scene.data` that it reads; a profile without a fetcher of each is refused."

    @property
    def label(self) -> str:
        """The name it is chosen by."""
        return str(self.__struct_config__.tag)


class Fetcher(Part, frozen=True, kw_only=True):
    """Makes a column of `scene.data`: once for each request, however many parts read it."""

    provides: ClassVar[str] = ""
    "The column's name."

    def fetch(self, scene: Scene) -> Floats:
        """The column; float64[n_slots]. `scene.data` holds the columns of the fetchers listed before."""
        raise NotImplementedError


class Filter(Part, frozen=True, kw_only=True):
    """Says where the request may go."""

    is_soft: ClassVar[bool] = False
    """
    Whether it only says where the request is better not put.

    A soft filter that leaves nothing lets a request wait that could still be on time, but hinders neither setting it
    aside nor the share of those set aside.
    """

    def keep(self, scene: Scene, candidates: Bools) -> Bools:
        """Which of the candidates stay; bool[n_slots]. What it says of others does not matter."""
        raise NotImplementedError


class Scorer(Part, frozen=True, kw_only=True):
    """Says how good each endpoint is."""

    weight: Annotated[float, Meta(ge=0)] = 1.0
    "Beside the other scorers'; 0: not asked."

    def score(self, scene: Scene, candidates: Bools) -> Floats:
        """From 0 to 1 for each candidate, more is better; float64[n_slots]. What it says of others does not matter."""
        raise NotImplementedError


class Picker(Part, frozen=True, kw_only=True):
    """Says with what chance each of those left is taken; the plan draws, and logs these chances."""

    def chances(self, scene: Scene, scores: Floats) -> Floats:
        """Float64[n_slots] that sum to 1, 0 where the score is `-inf`.

        Args:
            scene: the request and the fleet.
            scores: float64[n_slots], the weighted mean of the scorers, 0 to 1; `-inf` where it may not go.
        """
        raise NotImplementedError
