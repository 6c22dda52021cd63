"""Requests of others on the same engines, which a dispatcher never hears of.

It only sees what becomes of the engines: how busy they are, what their caches hold, how long its own requests take.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import structs

from scheduler.sim import chain
from scheduler.sim.arriving import Row
from scheduler.sim.fleet import Machine
from scheduler.sim.sequence import Sequence as Prompt


class Visit(msgspec.Struct, frozen=True):
    """One of them, and the endpoint whose engine it goes to."""

    row: Row
    endpoint: str


def parted(
    rows: Sequence[Row], share: float, endpoints: Sequence[str], rng: np.random.Generator
) -> tuple[tuple[Row, ...], tuple[Visit, ...]]:
    """Those that the dispatcher is asked, and a share of all conversations that go to engines by chance."""
    is_foreign: dict[int, bool] = {}
    own: list[Row] = []
    visits: list[Visit] = []
    for at, row in enumerate(rows):
        session = row.arrival.session
        whose = -1 - at if session is None else session
        if whose not in is_foreign:
            is_foreign[whose] = bool(rng.random() < share)
        if is_foreign[whose]:
            visits.append(Visit(row, endpoints[int(rng.integers(len(endpoints)))]))
        else:
            request = structs.replace(row.request, id=str(len(own)))
            own.append(structs.replace(row, request=request))
    return tuple(own), tuple(visits)


def prompt(visit: Visit, name: str, machine: Machine) -> Prompt | None:
    """What the engine of this machine is given, under this name; None where it is longer than all it has room for."""
    arrival = visit.row.arrival
    room = machine.tokens_max - arrival.prompt_tokens
    if room < 1:
        return None
    return Prompt(
        name,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        keys=chain.keys(arrival, machine.settings.block_size),
        max_tokens=room,
    )
