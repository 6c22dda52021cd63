"""What the lab's commands share: their options, reading files, and running cells in parallel processes."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Annotated

import msgspec
import typer
from msgspec import structs

from dispatcher.cli import lab_policy
from dispatcher.cli.crew import Crew
from dispatcher.cli.download import FileError
from scheduler.errors import SettingsError
from scheduler.sim import catalogue, foresight, policy, promise, report, shape, trace, workload
from scheduler.sim import fleet as fleets
from scheduler.sim.fleet import CERTAIN, NO_DELAYS, Fleet
from scheduler.sim.foresight import Lengths
from scheduler.sim.lab import Bounds, Lab
from scheduler.sim.promise import Promised
from scheduler.sim.report import Report
from scheduler.sim.workload import Arrival

SEEDS_MAX = 1000

TraceOption = Annotated[
    Path, typer.Option("--trace", metavar="FILE", help="A trace; see `headgate trace`.")
]
FleetOption = Annotated[
    str,
    typer.Option(
        "--fleet", metavar="NAME|FILE", help="A TOML file or: " + ", ".join(catalogue.FLEETS)
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="P[,P...]",
        help="Each NAME or NAME:FIELD=VALUE; the core's also :profile=FILE. Names: "
        + ", ".join(policy.BY_NAME),
    ),
]
SloOption = Annotated[
    Path | None, typer.Option("--slo", metavar="FILE", help="Promises by class, as TOML.")
]
SliceOption = Annotated[
    str | None, typer.Option("--slice", metavar="A:B", help="Only these seconds of the trace.")
]
SeedsOption = Annotated[
    int, typer.Option("--seeds", min=1, max=SEEDS_MAX, help="Machines and chance are drawn anew.")
]
CutOption = Annotated[
    float, typer.Option(min=0.0, max=0.9, help="Leave this share of first arrivals out of figures.")
]
ClosedOption = Annotated[
    bool,
    typer.Option(
        "--closed",
        help="A turn waits for the one before; pauses between them stay as they are at any load.",
    ),
]
ExactOption = Annotated[
    bool,
    typer.Option("--exact", help="Machines as their profiles say: no jitter, noise or stalls."),
]
ZeroDelayOption = Annotated[
    bool, typer.Option("--zero-delay", help="Everybody knows everything at once.")
]
BlockTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Make each prefix block of the trace this long, and prompts with them."
    ),
]
PromptMaxOption = Annotated[int | None, typer.Option(min=1, help="Cut longer prompts.")]
OutputScaleOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1e6, help="Times every output; 0 leaves one token, for prefill alone."
    ),
]
LengthsOption = Annotated[
    Lengths,
    typer.Option(help="What requests say of their answers' lengths; guesses err as published."),
]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Parallel processes; else one a core.")
]


class Cell(msgspec.Struct, frozen=True):
    """One run to be made."""

    label: str
    seed: int
    rate_rps: float
    load: float | None
    with_curves: bool = False
    is_timed: bool = True


def stage(
    file: Path,
    fleet: str,
    *,
    slo: Path | None = None,
    slice_: str | None = None,
    cut: float = 0.0,
    closed: bool = False,
    exact: bool = False,
    zero_delay: bool = False,
    block_tokens: int | None = None,
    prompt_max: int | None = None,
    output_scale: float = 1.0,
    lengths: Lengths = "unknown",
) -> Lab:
    """The stage that these options set.

    Raises:
        HeadgateError: a file cannot be read or says what cannot be.
    """
    arrivals = _arrivals(file, slice_)
    if block_tokens is not None:
        arrivals = shape.reblocked(arrivals, block_tokens)
    arrivals = shape.trimmed(arrivals, prompt_max=prompt_max, output_scale=output_scale)
    arrivals = foresight.foreseen(arrivals, lengths)
    work = Promised(arrivals)
    if slo is not None:
        work = promise.applied(arrivals, promise.parse(text(slo), str(slo)))
    found = load_fleet(fleet)
    if exact:
        found = structs.replace(found, chance=CERTAIN)
    if zero_delay:
        found = structs.replace(found, delays=NO_DELAYS)
    made = Lab(fleet=found, work=work, trace=file.name.split(".")[0], cut=cut, closed=closed)
    made.check()
    return made


def load_fleet(name: str) -> Fleet:
    """A fleet by name, or from a file where the name looks like one."""
    path = Path(name)
    if name.endswith(".toml") or path.is_file():
        return fleets.parse(text(path), name)
    return catalogue.named(name)


LEAST, MOST = 1e-6, 1e9
"Of loads, rates and shares: beyond them a run ends after nobody is left to see it, or is one instant."


def numbers(text: str, what: str) -> list[float]:
    """Positive numbers from a comma-separated list."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(LEAST <= number <= MOST for number in found):
        raise typer.BadParameter(
            f"{what} is {text!r}, wanted positive numbers such as 0.5,0.9, from {LEAST:g} to {MOST:g}"
        )
    return found


def labels(text: str) -> list[str]:
    """Policies from a comma-separated list, each known to exist."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise SettingsError(f"policy is {text!r}, wanted one of: {', '.join(policy.BY_NAME)}")
    for label in found:
        lab_policy.named(label)
    return found


class Bench(Crew):
    """Processes that all hold the same lab."""

    def __init__(self, stage: Lab, jobs: int | None) -> None:
        super().__init__(jobs, _hold, stage)

    def capacities(self, seeds: int) -> list[float]:
        """The fleet's capacity on each seed's machines."""
        return self.all("capacity", _capacity, [(seed,) for seed in range(seeds)])

    def cells(self, cells: Sequence[Cell]) -> list[Report]:
        """Every cell's report, in the order given."""
        return self.all("cells", _run, [(cell,) for cell in cells])

    def bounds(self, places: Sequence[tuple[int, float]]) -> list[Bounds]:
        """The bounds at each (seed, rate)."""
        return self.all("bounds", _bounds, places)


_lab: Lab | None = None
"Of this process."


def _hold(stage: Lab) -> None:
    global _lab  # noqa: PLW0603  a process of the pool holds one lab for all of its life
    _lab = stage


def _held() -> Lab:
    assert _lab is not None, "a process of the pool has no lab"
    return _lab


def _capacity(seed: int) -> float:
    return _held().capacity_rps(seed)


def _bounds(seed: int, rate_rps: float) -> Bounds:
    return _held().bounds(seed, rate_rps)


def _run(cell: Cell) -> Report:
    found, world = _held().run(
        lab_policy.named(cell.label),
        label=cell.label,
        seed=cell.seed,
        rate_rps=cell.rate_rps,
        load=cell.load,
        timer=perf_counter_ns if cell.is_timed else None,
    )
    return structs.replace(found, curves=report.curves(world)) if cell.with_curves else found


def _arrivals(file: Path, slice_: str | None) -> tuple[Arrival, ...]:
    try:
        with file.open("rb") as raw:
            found = trace.read(raw, name=str(file)).arrivals
    except OSError as error:
        raise FileError(f"cannot read {str(file)!r}: {error.strerror}") from None
    if slice_ is None:
        return found
    try:
        start_s, end_s = (float(part) for part in slice_.split(":"))
        return workload.sliced(found, start_s, end_s)
    except ValueError as error:
        raise typer.BadParameter(f"slice is {slice_!r}, wanted A:B in seconds: {error}") from None


def text(path: Path) -> str:
    """All of a file that a person wrote."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise FileError(f"cannot read {str(path)!r}: {reason}") from None
