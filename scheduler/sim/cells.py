"""The cells of the evaluation as data: `cells.toml` beside this file, or one of the same shape.

    [cells.K1-conv]
    asks = "..."                 # whose claim it tests
    fleet = "a100x4"             # a built-in one, or `endpoints` as a fleet file has them
    policies = "orders"          # one of [policies], or a list of such and of policies: ["orders", "edf:seats=48"]
    baseline = "fcfs"
    metrics = ["on_time"]
    loads = [0.9, 1.1]           # multiples of the capacity of each seed's machines; or, in their place,
    keeps = [0.95, 0.6]          # those at which the baseline has such shares on time, found anew for each draw

    [[cells.K1-conv.parts]]      # one trace, or several at once with their shares of all requests
    trace = "azure23_conv_a"
    promise = [{ttft_ms = 1000}] # classes as a promise file has them

A window is a piece of the trace that is measured, with a run-in before it that is played and left out of the figures:
caches are warm and whoever learns has learned. Windows of the shipped cells begin where nobody tunes.
"""

import tomllib
from collections.abc import Callable
from importlib import resources
from typing import Annotated

import msgspec
from msgspec import structs

from scheduler.errors import SettingsError
from scheduler.sim import catalogue, foresight, promise, shape
from scheduler.sim import fleet as fleets
from scheduler.sim.fleet import NO_DELAYS, EndpointSpec, Fault, Fleet
from scheduler.sim.foresight import Lengths
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Class, Promises
from scheduler.sim.workload import Arrival, Workload

Read = Callable[[str], tuple[Arrival, ...]]
"All arrivals of a trace by its name."


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trace of a cell, and what is done to it."""

    trace: str
    share: float = 1.0
    "Of all requests, where there are several parts."
    block_tokens: int | None = None
    prompt_max: int | None = None
    output_scale: float = 1.0
    groups: int = 0
    "So many groups of prompts that begin alike for `group_share` of their tokens; 0: as the trace shares."
    group_share: float = 0.0
    promise: tuple[Class, ...] = ()


class Burst(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A flash crowd made of the trace's own rows."""

    at_s: float
    "After the window's begin."
    seconds: float
    times: float


class Cell(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the evaluation."""

    asks: str
    parts: tuple[Part, ...]
    policies: str | tuple[str, ...]
    baseline: str
    metrics: tuple[str, ...]
    loads: tuple[float, ...] = ()
    keeps: tuple[Annotated[float, msgspec.Meta(gt=0, lt=1)], ...] = ()
    fleet: str = ""
    endpoints: tuple[EndpointSpec, ...] = ()
    faults: tuple[Fault, ...] = ()
    "Moments count from the begin of the run, run-in included, at whatever load."
    windows: tuple[float, ...]
    "Where each begins, seconds of the trace."
    window_s: float
    run_in_s: float
    seeds: int
    closed: bool = False
    foreign: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    "Share of conversations that others send to the same engines by chance, past the dispatcher."
    lengths: Lengths = "unknown"
    zero_delay: bool = False
    burst: Burst | None = None
    tenants: dict[str, float] = {}

    @property
    def n_draws(self) -> int:
        """Windows times seeds: how often each policy is run at each place."""
        return len(self.windows) * self.seeds

    @property
    def places(self) -> tuple[float, ...]:
        return self.keeps or self.loads

    def said(self, place: float) -> str:
        """How a place is called in tables."""
        return f"`{self.baseline}` keeps {place:.0%}" if self.keeps else f"at {place:g}"


class Book(msgspec.Struct, frozen=True, kw_only=True):
    """All cells of a file, each complete, with its policies spelt out."""

    cells: dict[str, Cell]

    def named(self, names: list[str]) -> dict[str, Cell]:
        """These, or all; a name that ends in * stands for all that begin so.

        Raises:
            SettingsError: there is none of that name.
        """
        if not names:
            return self.cells
        found: dict[str, Cell] = {}
        for name in names:
            stem = name.removesuffix("*")
            chosen = [
                one for one in self.cells if one == name or (stem != name and one.startswith(stem))
            ]
            if not chosen:
                raise SettingsError(f"cell is {name!r}, wanted one of: {', '.join(self.cells)}")
            found |= {one: self.cells[one] for one in chosen}
        return found


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cells: dict[str, dict[str, object]]
    defaults: dict[str, object] = {}
    policies: dict[str, tuple[str, ...]] = {}


def shipped() -> Book:
    """The evaluation's own."""
    raw = (resources.files(__package__) / "cells.toml").read_text(encoding="utf-8")
    return parse(raw, "cells.toml")


def parse(text: str, name: str) -> Book:
    """The cells that this TOML describes.

    Raises:
        SettingsError: no TOML, an unknown key, or a cell without what it needs; names the cell.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise SettingsError(f"cells {name}: {error}") from None
    cells = {}
    for title, fields in file.cells.items():
        try:
            cell = msgspec.convert(file.defaults | fields, Cell)
        except msgspec.ValidationError as error:
            raise SettingsError(f"cells {name}: {title}: {error}") from None
        cells[title] = _complete(cell, file.policies, f"cells {name}: {title}")
    return Book(cells=cells)


def lab(name: str, cell: Cell, window: int, read: Read) -> Lab:
    """The stage of one window of a cell.

    Raises:
        SettingsError: it cannot be: no such fleet, no arrival, a prompt that fits nowhere.
    """
    begin_s = cell.windows[window]
    start_s = max(0.0, begin_s - cell.run_in_s)
    arrivals = shape.mixed(
        [(_shaped(read(part.trace), part, at), part.share) for at, part in enumerate(cell.parts)],
        start_s=start_s,
        window_s=begin_s - start_s + cell.window_s,
    )
    run_in_s = begin_s - start_s
    if cell.burst is not None:
        begin = run_in_s + cell.burst.at_s
        arrivals = shape.crowded(arrivals, begin, cell.burst.seconds, cell.burst.times)
    n_before = sum(arrival.at_s < run_in_s for arrival in arrivals)
    classes = tuple(
        structs.replace(one, client=str(at))
        for at, part in enumerate(cell.parts)
        for one in part.promise
    )
    promises = Promises(classes=classes, tenants=cell.tenants)
    made = Lab(
        fleet=_fleet(name, cell),
        work=promise.applied(foresight.foreseen(arrivals, cell.lengths), promises),
        trace=name,
        cut=n_before / max(1, len(arrivals)),
        closed=cell.closed,
        foreign=cell.foreign,
        window=f"{begin_s:g}",
    )
    made.check()
    return made


def _complete(cell: Cell, groups: dict[str, tuple[str, ...]], where: str) -> Cell:
    words = (cell.policies,) if isinstance(cell.policies, str) else cell.policies
    if isinstance(cell.policies, str) and cell.policies not in groups:
        raise SettingsError(
            f"{where}: policies is {cell.policies!r}, wanted one of: {', '.join(groups)}"
        )
    policies = tuple(dict.fromkeys(one for word in words for one in groups.get(word, (word,))))
    if cell.baseline not in policies:
        policies = (cell.baseline, *policies)
    if bool(cell.fleet) == bool(cell.endpoints):
        raise SettingsError(f"{where}: wanted either fleet or endpoints")
    if bool(cell.loads) == bool(cell.keeps):
        raise SettingsError(f"{where}: wanted either loads or keeps")
    if cell.foreign and cell.closed:
        raise SettingsError(f"{where}: foreign is {cell.foreign:g} in a closed loop, wanted 0")
    if not (cell.parts and cell.windows and cell.metrics):
        raise SettingsError(f"{where}: wanted at least one of parts, windows and metrics")
    return structs.replace(cell, policies=policies)


def _shaped(arrivals: Workload, part: Part, at: int) -> Workload:
    if part.block_tokens is not None:
        arrivals = shape.reblocked(arrivals, part.block_tokens)
    arrivals = shape.trimmed(arrivals, prompt_max=part.prompt_max, output_scale=part.output_scale)
    if part.groups:
        arrivals = shape.grouped(arrivals, groups=part.groups, share=part.group_share)
    return tuple(structs.replace(arrival, client=str(at)) for arrival in arrivals)


def _fleet(name: str, cell: Cell) -> Fleet:
    found = (
        catalogue.named(cell.fleet)
        if cell.fleet
        else fleets.checked(Fleet(name=name, endpoints=cell.endpoints))
    )
    if cell.faults:
        found = fleets.checked(structs.replace(found, faults=cell.faults))
    return structs.replace(found, delays=NO_DELAYS) if cell.zero_delay else found
