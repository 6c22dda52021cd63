"""A cell's runs: what of them is missing in a file of results, made in parallel processes, a line of JSON each.

1. each draw's capacity is measured, where no line of the file has it yet
2. in a cell that says what its baseline keeps, the loads at which it does are found for each draw
3. every policy is run at every place, and its line appended as it comes
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from time import perf_counter_ns

import msgspec
from msgspec import structs

from dispatcher.cli import lab_policy
from dispatcher.cli.crew import Crew
from dispatcher.cli.download import FileError
from scheduler.errors import UNREADABLE
from scheduler.sim import attainment, cells, contrast, trace
from scheduler.sim.cells import Cell
from scheduler.sim.lab import Lab
from scheduler.sim.report import Report
from scheduler.sim.workload import Arrival

Draw = tuple[int, int]
"Window, counted from 0, and seed."


class Run(msgspec.Struct, frozen=True):
    """One run to be made."""

    draw: Draw
    place: float
    policy: str


def read(path: Path) -> list[Report]:
    """The runs of a cell so far. A line that was cut off by a kill is taken away, and run again."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines := lines[:-1]))
    try:
        return [msgspec.json.decode(line, type=Report) for line in lines]
    except UNREADABLE as error:
        raise FileError(f"{str(path)!r} is not what `cells run` writes: {error}") from None


def make(name: str, cell: Cell, traces: Path, path: Path, jobs: int | None) -> None:
    """Run what the file lacks of a cell, and add it there."""
    done = read(path)
    made = {(one.window, one.seed, contrast.place(one), one.policy) for one in done}
    wanted = [
        Run((window, seed), place, label)
        # Seeds outermost: stopped half-way, every policy has met the same draws.
        for seed in range(cell.seeds)
        for window in range(len(cell.windows))
        for place in cell.places
        for label in cell.policies
        if (f"{cell.windows[window]:g}", seed, place, label) not in made
    ]
    if not wanted:
        return
    stage = cells.lab(name, cell, 0, lambda trace_name: _arrivals(traces, trace_name))
    for label in cell.policies:  # before minutes go into what the last of them refuses
        stage.admit(lab_policy.named(label))
    capacities, loads = _known(cell, done)
    with Crew(jobs, _open, name, cell, traces) as crew, path.open("ab") as file:
        draws = list(dict.fromkeys(one.draw for one in wanted))
        new = [draw for draw in draws if draw not in capacities]
        found = crew.all(f"{name}: capacity", _capacity, [(draw,) for draw in new])
        capacities |= zip(new, found, strict=True)
        if cell.keeps:
            new = [draw for draw in draws if any((draw, at) not in loads for at in cell.keeps)]
            asked = [(draw, capacities[draw]) for draw in new]
            for at, kept in crew.each(f"{name}: loads", _loads, asked):
                loads |= {(new[at], place): load for place, load in kept.items()}
        calls = [
            (one, loads.get((one.draw, one.place), one.place), capacities[one.draw])
            for one in wanted
        ]
        for _, report in crew.each(name, _play, calls):
            file.write(msgspec.json.encode(report) + b"\n")
            file.flush()


def on_time_bounds(
    name: str, cell: Cell, traces: Path, reports: list[Report], jobs: int | None
) -> dict[float, dict[contrast.Draw, float]]:
    """By place and draw, the closer bound on the share on time, where a cell has one; takes seconds each."""
    starts = [f"{start_s:g}" for start_s in cell.windows]
    wanted = {
        (contrast.place(one), (one.window, one.seed)): one.rate_rps
        for one in reports
        if one.on_time_bound is not None and one.window in starts
    }
    if not wanted:
        return {}
    with Crew(jobs, _open, name, cell, traces) as crew:
        calls = [
            (starts.index(window), seed, rate_rps)
            for (_, (window, seed)), rate_rps in wanted.items()
        ]
        found = crew.all(f"{name}: bounds", _on_time_bound, calls)
    bounds: dict[float, dict[contrast.Draw, float]] = {}
    for (place, draw), bound in zip(wanted, found, strict=True):
        if bound is not None:
            bounds.setdefault(place, {})[draw] = bound
    return bounds


def _known(
    cell: Cell, done: list[Report]
) -> tuple[dict[Draw, float], dict[tuple[Draw, float], float]]:
    """Capacities, and loads of what is kept, that were found before."""
    capacities, loads = {}, {}
    for one in done:
        if one.capacity_rps is None or float(one.window) not in cell.windows:
            continue
        draw = cell.windows.index(float(one.window)), one.seed
        capacities[draw] = one.capacity_rps
        if one.keeps is not None and one.load is not None:
            loads[draw, one.keeps] = one.load
    return capacities, loads


_stage: tuple[str, Cell, Path] | None = None
"Of this process: the cell that it runs, and where traces lie."


def _open(name: str, cell: Cell, traces: Path) -> None:
    global _stage  # noqa: PLW0603  a process runs one cell after the other
    _stage = (name, cell, traces)
    _lab.cache_clear()
    _bounds_of.cache_clear()


def _held() -> tuple[str, Cell, Path]:
    assert _stage is not None, "a process of the pool has no cell"
    return _stage


@lru_cache(maxsize=4)
def _lab(window: int) -> Lab:
    name, cell, traces = _held()
    return cells.lab(name, cell, window, lambda trace_name: _arrivals(traces, trace_name))


@lru_cache(maxsize=8)
def _bounds_of(window: int, seed: int, rate_rps: float) -> tuple[float | None, float | None]:
    found = _lab(window).bounds(seed, rate_rps)
    return found.ttft_mean_s, found.on_time


def _on_time_bound(window: int, seed: int, rate_rps: float) -> float | None:
    return _lab(window).on_time_bound(seed, rate_rps)


@lru_cache(maxsize=8)
def _arrivals(traces: Path, name: str) -> tuple[Arrival, ...]:
    for ending in (".jsonl.gz", ".jsonl"):
        path = traces / f"{name}{ending}"
        if path.is_file():
            with path.open("rb") as raw:
                return trace.read(raw, name=str(path)).arrivals
    raise FileError(
        f"no trace {name}.jsonl or {name}.jsonl.gz in {str(traces)!r}; see `headgate trace`"
    )


def _capacity(draw: Draw) -> float:
    window, seed = draw
    return _lab(window).capacity_rps(seed)


def _loads(draw: Draw, capacity_rps: float) -> Mapping[float, float]:
    """By share kept: the load of this draw at which the baseline keeps it."""
    cell = _held()[1]

    def kept(load: float) -> float:
        return _report(draw, load, cell.baseline, capacity_rps).on_time

    return dict(zip(cell.keeps, attainment.loads(kept, cell.keeps), strict=True))


def _play(one: Run, load: float, capacity_rps: float) -> Report:
    window, seed = one.draw
    found = _report(one.draw, load, one.policy, capacity_rps)
    ttft_mean_s, on_time = _bounds_of(window, seed, found.rate_rps)
    return structs.replace(
        found,
        ttft_mean_bound_s=ttft_mean_s,
        on_time_bound=on_time,
        capacity_rps=capacity_rps,
        keeps=one.place if _held()[1].keeps else None,
    )


def _report(draw: Draw, load: float, label: str, capacity_rps: float) -> Report:
    window, seed = draw
    found, _ = _lab(window).run(
        lab_policy.named(label),
        label=label,
        seed=seed,
        rate_rps=load * capacity_rps,
        load=load,
        timer=perf_counter_ns,
    )
    return found
