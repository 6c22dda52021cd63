"""`headgate cells`: the evaluation's cells, run bit by bit and set in tables."""

from functools import lru_cache
from pathlib import Path
from time import perf_counter_ns
from typing import Annotated

import msgspec
import typer
from msgspec import structs

from dispatcher.cli import contender, lab, tables
from dispatcher.cli.crew import Crew
from dispatcher.cli.download import FileError
from scheduler.sim import cells, contrast, trace
from scheduler.sim.cells import Cell
from scheduler.sim.contrast import Standing
from scheduler.sim.lab import Lab
from scheduler.sim.report import Report
from scheduler.sim.workload import Arrival

app = typer.Typer()
group = typer.Typer(
    name="cells", no_args_is_help=True, help="The evaluation's cells: list, run, set in tables."
)
app.add_typer(group)

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME...]", help="Cells, or K1-* for all that begin so."),
]
ListFile = Annotated[
    Path | None, typer.Option("--list", metavar="FILE", help="Cells of your own, as TOML.")
]
Traces = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the traces lie, NAME.jsonl or NAME.jsonl.gz.")
]

OURS = "plan"

Draw = tuple[int, int]
"Window, counted from 0, and seed."


class Run(msgspec.Struct, frozen=True):
    """One run to be made."""

    cell: str
    draw: Draw
    load: float
    policy: str


@group.command("list")
def list_(names: Names = None, file: ListFile = None) -> None:
    """What there is, and how many runs each takes."""
    for name, cell in _chosen(names, file).items():
        runs = len(cell.policies) * len(cell.loads) * len(cell.windows) * cell.seeds
        typer.echo(f"{name:16} {runs:5} runs  {cell.asks}")


@group.command()
def run(
    names: Names = None,
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="One file a cell; what is there is not run again."
        ),
    ],
    traces: Traces = Path(),
    file: ListFile = None,
    policies: Annotated[
        str | None, typer.Option("--policy", metavar="P[,P...]", help="Only these of each cell.")
    ] = None,
    load: Annotated[
        str | None, typer.Option(metavar="X[,X...]", help="Only these of each cell.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    jobs: lab.JobsOption = None,
) -> None:
    """Run what is missing of these cells, a line of JSON a run; stop and go on at will."""
    chosen = _chosen(names, file)
    labels = None if policies is None else lab.labels(policies)
    loads = None if load is None else lab.numbers(load, "load")
    out.mkdir(parents=True, exist_ok=True)
    for name, cell in chosen.items():
        wanted = structs.replace(
            cell,
            policies=tuple(labels or cell.policies),
            loads=tuple(loads or cell.loads),
            windows=cell.windows[:windows],
            seeds=min(cell.seeds, seeds or cell.seeds),
        )
        _run_cell(name, wanted, traces, out / f"{name}.jsonl", jobs)


@group.command()
def table(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where `cells run` wrote.")],
    names: Names = None,
    *,
    file: ListFile = None,
) -> None:
    """Every cell's tables as Markdown: medians, intervals, differences to the baseline, bounds."""
    ran = []
    for name, cell in _chosen(names, file).items():
        reports = _read(directory / f"{name}.jsonl")
        if not any(one.policy == cell.baseline for one in reports):
            typer.echo(f"{name}: {cell.baseline}, the baseline, was not run", err=True)
            continue
        ran.append((cell.metrics[0], reports))
        typer.echo(f"### {name}: {cell.asks}\n")
        for metric in cell.metrics:
            rows = contrast.contrasts(reports, metric=metric, baseline=cell.baseline)
            typer.echo(tables.markdown(metric, rows, cell.baseline, _bounds(reports, metric)))
    typer.echo(_standings(contrast.standings(ran, ours=OURS)))


def _chosen(names: list[str] | None, file: Path | None) -> dict[str, Cell]:
    book = cells.shipped() if file is None else cells.parse(lab.text(file), str(file))
    return book.named(names or [])


def _run_cell(name: str, cell: Cell, traces: Path, path: Path, jobs: int | None) -> None:
    done = _read(path)
    made = {(one.window, one.seed, one.load, one.policy): one for one in done}
    wanted = [
        Run(name, (window, seed), load, label)
        # Seeds outermost: stopped half-way, every policy has met the same draws.
        for seed in range(cell.seeds)
        for window in range(len(cell.windows))
        for load in cell.loads
        for label in cell.policies
        if (f"{cell.windows[window]:g}", seed, load, label) not in made
    ]
    if not wanted:
        return
    stage = cells.lab(name, cell, 0, lambda trace_name: _arrivals(traces, trace_name))
    for label in cell.policies:  # before minutes go into what the last of them refuses
        stage.admit(contender.named(label))
    capacities = {
        (cell.windows.index(float(one.window)), one.seed): one.capacity_rps
        for one in done
        if one.capacity_rps is not None and float(one.window) in cell.windows
    }
    with Crew(jobs, _open, name, cell, traces) as crew, path.open("ab") as file:
        draws = list(dict.fromkeys(one.draw for one in wanted if one.draw not in capacities))
        rates = crew.all(f"{name}: capacity", _capacity, [(draw,) for draw in draws])
        capacities |= zip(draws, rates, strict=True)
        calls = [(one, capacities[one.draw]) for one in wanted]
        for _, found in crew.each(name, _play, calls):
            file.write(msgspec.json.encode(found) + b"\n")
            file.flush()


_stage: tuple[str, Cell, Path] | None = None
"Of this process: the cell that it runs, and where traces lie."


def _open(name: str, cell: Cell, traces: Path) -> None:
    global _stage  # noqa: PLW0603  a process runs one cell after the other
    _stage = (name, cell, traces)
    _lab.cache_clear()
    _bounds_of.cache_clear()


@lru_cache(maxsize=4)
def _lab(window: int) -> Lab:
    assert _stage is not None, "a process of the pool has no cell"
    name, cell, traces = _stage
    return cells.lab(name, cell, window, lambda trace_name: _arrivals(traces, trace_name))


@lru_cache(maxsize=8)
def _bounds_of(window: int, seed: int, rate_rps: float) -> tuple[float, float | None]:
    found = _lab(window).bounds(seed, rate_rps)
    return found.ttft_mean_s, found.on_time


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


def _play(one: Run, capacity_rps: float) -> Report:
    window, seed = one.draw
    rate_rps = one.load * capacity_rps
    stage = _lab(window)
    ttft_mean_s, on_time = _bounds_of(window, seed, rate_rps)
    found, _ = stage.run(
        contender.named(one.policy),
        label=one.policy,
        seed=seed,
        rate_rps=rate_rps,
        load=one.load,
        timer=perf_counter_ns,
    )
    return structs.replace(
        found, ttft_mean_bound_s=ttft_mean_s, on_time_bound=on_time, capacity_rps=capacity_rps
    )


def _read(path: Path) -> list[Report]:
    """The runs of a cell so far. A line that was cut off by a kill is taken away, and run again."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines := lines[:-1]))
    try:
        return [msgspec.json.decode(line, type=Report) for line in lines]
    except msgspec.DecodeError as error:
        raise FileError(f"{str(path)!r} is not what `cells run` writes: {error}") from None


def _standings(found: list[Standing]) -> str:
    """Over all cells and loads, each cell by its first figure."""
    lines = [
        "### All of them\n",
        f"| `{OURS}` against | overall | won | lost | places |",
        "|---" * 5 + "|",
    ]
    for one in found:
        points = f"{100 * one.overall:+.1f} points"
        overall = f"{one.overall:.2f} times" if one.is_ratio else points
        lines.append(f"| `{one.other}` | {overall} | {one.n_won} | {one.n_lost} | {one.n_places} |")
    return "\n".join(lines)


def _bounds(reports: list[Report], metric: str) -> dict[float, float]:
    """What nobody can beat, the median at each load where something is known."""
    kind = {"ttft_mean_s": "ttft_mean_bound_s", "on_time": "on_time_bound"}.get(metric)
    if kind is None:
        return {}
    by_load: dict[float, list[float]] = {}
    for one in reports:
        bound = getattr(one, kind)
        if bound is not None and one.load is not None:
            by_load.setdefault(one.load, []).append(bound)
    return {load: contrast.bootstrap(values).median for load, values in by_load.items()}
