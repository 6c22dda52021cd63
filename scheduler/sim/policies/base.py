"""What every policy of the lab offers, and what it is told at its start.

Each is a frozen Struct: its tag is its name, its fields are its settings (`name:field=value` on the command line), its
docstring says whose it is. `dispatch` makes the thing that the world drives. What a policy may read follows from what
it hands to its router: see `baselines.senses`.
"""

from typing import Annotated

import msgspec
import numpy as np

from scheduler.core import CoreSettings
from scheduler.sim.fleet import Delays
from scheduler.sim.world import Dispatch
from scheduler.slo import Objective

PREFIX_BLOCKS = 16_384
"Blocks of 128 tokens that a peer's prefix table holds for an endpoint: two million tokens, as llm-d's default."


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What every policy is told at its start."""

    rng: np.random.Generator
    delays: Delays
    is_parted: bool = False
    "Whether some endpoints only prefill."
    objectives: dict[str, Objective] = {}
    tenants: dict[str, float] = {}
    core: CoreSettings | None = None
    "Of the dispatcher whose recording this is, if it is one."


class LabPolicy(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"
):
    """What all of them offer."""

    seats: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """
    The engines' `max_num_seqs` under this policy, where they decode; None for the fleet's own.

    Whoever runs a policy that does not watch the pace of decoding sets this by hand, so each may be run as set best.
    """

    @property
    def label(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def is_peer(self) -> bool:
        """Whether somebody else's, which one could run in place of ours."""
        return True

    @property
    def is_open(self) -> bool:
        """Whether jobs go into the engine as they come; else the worker's admission stands before it."""
        return True

    @property
    def scrapes(self) -> bool:
        """Whether it reads engines' own figures."""
        return False

    @property
    def hears(self) -> bool:
        """Whether engines publish what they cache, for it to hear."""
        return False

    @property
    def parts(self) -> bool:
        """Whether it has a form for fleets that part prefill from decode."""
        return False

    def dispatch(self, stage: Stage) -> Dispatch:
        raise NotImplementedError
