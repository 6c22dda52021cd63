"""`headgate cells`: the evaluation's cells, run bit by bit and set in tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from msgspec import structs

from dispatcher.cli import brief as brief_of
from dispatcher.cli import lab, runs, tables
from dispatcher.cli.download import FileError
from scheduler.errors import SettingsError
from scheduler.sim import cells, contrast, policy, verdict
from scheduler.sim.cells import Cell
from scheduler.sim.contrast import Figures, Standing
from scheduler.sim.report import Report
from scheduler.sim.verdict import Sides

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

SIDES = Sides(ours="plan", oracle="oracle", is_peer=policy.is_peer)


@group.command("list")
def list_(names: Names = None, file: ListFile = None) -> None:
    """What there is, and how many runs each takes."""
    for name, cell in _chosen(names, file).items():
        count = len(cell.policies) * len(cell.places) * cell.n_draws
        typer.echo(f"{name:18} {count:5} runs  {cell.asks}")


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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {str(out)!r}: {error.strerror}") from None
    for name, cell in chosen.items():
        wanted = structs.replace(
            cell,
            policies=tuple(labels or cell.policies),
            windows=cell.windows[:windows],
            seeds=min(cell.seeds, seeds or cell.seeds),
        )
        if loads is not None:
            wanted = _at_loads(name, wanted, loads)
        runs.make(name, wanted, traces, out / f"{name}.jsonl", jobs)


@group.command()
def table(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where `cells run` wrote.")],
    names: Names = None,
    *,
    file: ListFile = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="A row a place: ours beside the best of the others.")
    ] = False,
) -> None:
    """Every cell's tables as Markdown: medians, intervals, differences to the baseline, bounds."""
    if not directory.is_dir():
        raise FileError(f"{str(directory)!r} is no directory, wanted one that `cells run` wrote")
    ran: dict[str, tuple[Cell, list[Report]]] = {}
    for name, cell in _chosen(names, file).items():
        reports = runs.read(directory / f"{name}.jsonl")
        if any(one.policy == cell.baseline for one in reports):
            ran[name] = cell, reports
        else:
            typer.echo(f"{name}: {cell.baseline}, the baseline, was not run", err=True)
    typer.echo(_brief(ran) if brief else _full(ran))


@group.command()
def bound(
    names: Names = None,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where `cells run` wrote.")],
    traces: Traces = Path(),
    file: ListFile = None,
    load: Annotated[
        str | None, typer.Option(metavar="X[,X...]", help="Only these of each cell.")
    ] = None,
    jobs: lab.JobsOption = None,
) -> None:
    """What nobody can have on time if no two endpoints serve one request at once, of what was run; seconds each."""
    loads = None if load is None else lab.numbers(load, "load")
    metric = "on_time"
    for name, cell in _chosen(names, file).items():
        reports = [
            one
            for one in runs.read(out / f"{name}.jsonl")
            if loads is None or contrast.place(one) in loads
        ]
        closer = runs.on_time_bounds(name, cell, traces, reports, jobs)
        if closer:
            found = contrast.figures(reports, metric)
            typer.echo(f"### {name}\n\n{tables.bounded(found, closer, SIDES.ours, at=cell.said)}")


def _at_loads(name: str, cell: Cell, loads: list[float]) -> Cell:
    """The same at these loads; of what the baseline keeps only what the cell has can be asked."""
    if not cell.keeps:
        return structs.replace(cell, loads=tuple(loads))
    keeps = tuple(share for share in cell.keeps if share in loads)
    if not keeps:
        known = ", ".join(f"{share:g}" for share in cell.keeps)
        raise SettingsError(f"{name}: load is what {cell.baseline} keeps, wanted some of: {known}")
    return structs.replace(cell, keeps=keeps)


def _full(ran: Mapping[str, tuple[Cell, list[Report]]]) -> str:
    """A table a cell and figure, a row a policy."""
    found = []
    for name, (cell, reports) in ran.items():
        found.append(f"### {name}: {cell.asks}\n")
        for metric in cell.metrics:
            rows = contrast.contrasts(reports, metric=metric, baseline=cell.baseline)
            bounds = _bounds(contrast.figures(reports, metric))
            found.append(
                tables.markdown(
                    metric, rows, cell.baseline, bounds, at=cell.said, n_wanted=cell.n_draws
                )
            )
    firsts = [(cell.metrics[0], reports) for cell, reports in ran.values()]
    return "\n".join([*found, _standings(contrast.standings(firsts, ours=SIDES.ours))])


def _brief(ran: Mapping[str, tuple[Cell, list[Report]]]) -> str:
    """Cells by their first figure, then families and policies by each; ablations, whose baseline is ours, are none."""
    judged = {
        (name, metric): verdict.verdicts(
            verdict.Cell(
                name=name, baseline=cell.baseline, figures=contrast.figures(reports, metric)
            ),
            SIDES,
        )
        for name, (cell, reports) in ran.items()
        if cell.baseline != SIDES.ours
        for metric in cell.metrics
    }
    firsts = [
        one for name, (cell, _) in ran.items() for one in judged.get((name, cell.metrics[0]), [])
    ]
    everything = [one for found in judged.values() for one in found]

    def at(name: str, place: float) -> str:
        return ran[name][0].said(place)

    return "\n".join(
        [
            brief_of.places(firsts, SIDES.ours, lambda name: ran[name][0].n_draws, at),
            brief_of.families(verdict.families(everything), SIDES.ours, at),
            brief_of.policies(everything),
        ]
    )


def _chosen(names: list[str] | None, file: Path | None) -> dict[str, Cell]:
    book = cells.shipped() if file is None else cells.parse(lab.text(file), str(file))
    return book.named(names or [])


def _standings(found: list[Standing]) -> str:
    """Over all cells and loads, each cell by its first figure."""
    lines = [
        "### All of them\n",
        f"| `{SIDES.ours}` against | overall | won | lost | places |",
        "|---" * 5 + "|",
    ]
    for one in found:
        points = f"{100 * one.overall:+.1f} points"
        overall = f"{one.overall:.2f} times" if one.is_ratio else points
        lines.append(f"| `{one.other}` | {overall} | {one.n_won} | {one.n_lost} | {one.n_places} |")
    return "\n".join(lines)


def _bounds(found: Figures) -> dict[float, float]:
    """What nobody can beat, the median at each place where something is known."""
    return {
        place: contrast.bootstrap(list(at.values())).median for place, at in found.bounds.items()
    }
