"""`headgate compare`: tables and pictures from what `headgate simulate --json` wrote."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from dispatcher.cli import tables
from dispatcher.cli.download import FileError
from scheduler.errors import UNREADABLE, SettingsError
from scheduler.sim import contrast
from scheduler.sim.contrast import Contrast, Estimate
from scheduler.sim.report import Report

app = typer.Typer()

METRICS = ("on_time", "ttft_mean_s", "ttft_p99_s")


@app.command()
def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="From `simulate --json` or `cells run`.")
    ],
    *,
    baseline: Annotated[
        str | None, typer.Option(metavar="POLICY", help="Whom the others are compared to.")
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="KEY[,KEY...]", help="Figures of the JSON to compare.")
    ] = ",".join(METRICS),
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write pictures and one page there; needs headgate[plots]."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for a document.")] = False,
) -> None:
    """Medians, 95 % bootstrap intervals and differences paired by window and seed."""
    reports = [one for file in files for one in _read(file)]
    if not reports:
        raise SettingsError(f"{files[0]}: no results, wanted at least one")
    base = baseline or reports[0].policy
    known = list(dict.fromkeys(one.policy for one in reports))
    if base not in known:
        raise SettingsError(f"baseline is {base!r}, wanted one of: {', '.join(known)}")
    found = {}
    for key in metric.split(","):
        if key not in Report.__struct_fields__ or not _is_number(reports[0], key):
            keys = [name for name in Report.__struct_fields__ if _is_number(reports[0], name)]
            raise SettingsError(f"metric is {key!r}, wanted one of: {', '.join(keys)}")
        found[key] = contrast.contrasts(reports, metric=key, baseline=base)
    for key, rows in found.items():
        if markdown:
            typer.echo(tables.markdown(key, rows, base))
        else:
            Console().print(_table(key, rows, base))
    if plots is not None:
        from dispatcher.cli import pictures  # noqa: PLC0415  matplotlib is an extra

        pictures.write(plots, reports, found, base)
        typer.echo(f"{plots / 'index.html'}", err=True)


def _read(file: Path) -> list[Report]:
    try:
        text = file.read_bytes()
        if file.suffix == ".jsonl":
            return msgspec.json.Decoder(Report).decode_lines(text)
        return msgspec.json.decode(text, type=list[Report])
    except OSError as error:
        raise FileError(f"cannot read {str(file)!r}: {error.strerror}") from None
    except UNREADABLE as error:
        raise FileError(
            f"{str(file)!r} is not what `simulate --json` or `cells run` writes: {error}"
        ) from None


def _is_number(one: Report, key: str) -> bool:
    return isinstance(getattr(one, key), (int, float)) and key != "seed"


def _header(key: str, rows: list[Contrast], base: str) -> list[str]:
    versus = tables.beside(key, base, is_ratio=bool(rows) and rows[0].is_ratio)
    return ["policy", "at", "runs", "median [95 %]", versus, "gap closed"]


def _cells(row: Contrast) -> list[str]:
    return [
        row.policy,
        f"{row.place:g}",
        str(row.n_runs),
        _said(row.value),
        "-" if row.versus is None else _said(row.versus, signed=not row.is_ratio),
        "-" if row.closed_gap is None else f"{row.closed_gap:.0%}",
    ]


def _said(found: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{found.median:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _table(key: str, rows: list[Contrast], base: str) -> Table:
    table = Table(*_header(key, rows, base), title=key)
    for row in rows:
        table.add_row(*_cells(row))
    return table
