"""`headgate trace`: get, make, convert and look at workloads.

Nothing public ships with Headgate: `get` fetches a public trace from its authors and writes it in our
format, `make` draws one from laws that hold published statistics.
"""

import gzip
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import msgspec
import numpy as np
import typer
from msgspec import structs
from rich.console import Console
from rich.table import Table

from dispatcher.cli.download import DownloadError, FileError, download, replacing
from scheduler.sim import convert, generate, summary, trace, workload
from scheduler.sim.generate import Crowd
from scheduler.sim.summary import Spread, Summary
from scheduler.sim.trace import Header, Trace

T = TypeVar("T")

app = typer.Typer()
group = typer.Typer(
    name="trace", no_args_is_help=True, help="Workloads: get, make, convert and look at them."
)
app.add_typer(group)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A public trace: where it lies and how to read it."""

    what: str
    licence: str
    url: str
    read: Callable[..., Trace]
    grid_s: float | None = None
    "The tick of the source's clock where it is coarse: `get` spreads rows inside it."


AZURE = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data/"
MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces/"
SOURCES = {
    "azure23-conv": Source(
        what="Chat on Azure, 11 Nov 2023; cite Splitwise, ISCA 2024",
        licence="CC-BY-4.0",
        url=AZURE + "AzureLLMInferenceTrace_conv.csv",
        read=convert.azure,
    ),
    "azure23-code": Source(
        what="Code completion on Azure, all bursts; cite Splitwise, ISCA 2024",
        licence="CC-BY-4.0",
        url=AZURE + "AzureLLMInferenceTrace_code.csv",
        read=convert.azure,
    ),
    "mooncake-conv": Source(
        what="Kimi conversations with prefix hashes; cite Mooncake, FAST 2025",
        licence="Apache-2.0",
        url=MOONCAKE + "conversation_trace.jsonl",
        read=convert.mooncake,
        grid_s=3.0,
    ),
}

SPREAD_SEED = 0
"Any will do, as long as two downloads of one trace are equal."

Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Where to; a name on .gz is packed.")
]
SourceName = Annotated[str, typer.Argument(metavar="NAME", help="One of: " + ", ".join(SOURCES))]
MixName = Annotated[str, typer.Option(metavar="NAME", help="One of: " + ", ".join(generate.MIXES))]
FormatName = Annotated[
    str,
    typer.Option("--from", metavar="FORMAT", help="One of: " + ", ".join(convert.FORMATS)),
]


@group.command("list")
def list_() -> None:
    """The public traces that `get` knows, and the mixes that `make` knows."""
    table = Table("name", "what", "licence", "command")
    for name, source in SOURCES.items():
        table.add_row(name, source.what, source.licence, f"headgate trace get {name}")
    for name, works in generate.MIXES.items():
        what = "Drawn: " + ", ".join(work.name for work in works)
        table.add_row(name, what, "ours", f"headgate trace make --mix {name}")
    Console().print(table)


@group.command()
def get(
    name: SourceName,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A copy of the file.")] = None,
    out: Out = None,
) -> None:
    """Download a public trace and write it in our format."""
    source = _known(SOURCES, name, "trace")
    address = url or source.url
    with tempfile.TemporaryFile() as raw:
        size = download(address, raw)
        raw.seek(0)
        found = source.read(raw, name=address)
    if not found.arrivals:
        raise DownloadError(f"{address} holds no request ({size} bytes), wanted a trace")
    made_up, rows = found.header.made_up, found.arrivals
    if source.grid_s is not None:
        rows = workload.spread(rows, source.grid_s, np.random.default_rng(SPREAD_SEED))
        made_up = f"moment inside each {source.grid_s:g} s tick (uniform, seed {SPREAD_SEED})"
    header = Header(trace=name, source=address, licence=source.licence, made_up=made_up)
    _save(Trace(header, rows), out or Path(f"{name}.jsonl.gz"))


@group.command()
def make(
    *,
    mix: MixName = "demo",
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="How much of it.")] = 600.0,
    rate: Annotated[
        float | None, typer.Option(help="Mean requests a second; else the mix's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    crowd: Annotated[
        str | None,
        typer.Option(
            metavar="START:END:TIMES", help="A flash crowd: so many times the arrivals between."
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Draw a workload from published laws and write it to a file."""
    works = _known(generate.MIXES, mix, "mix")
    own_rate = sum(work.arrivals.rate_per_s for work in works)
    factor = 1.0 if rate is None else rate / own_rate
    crowds = (_crowd(crowd),) if crowd else ()
    try:
        rows = generate.generated(
            [_busier(work, factor, crowds) for work in works],
            duration_s=duration,
            rng=np.random.default_rng(seed),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    made_up = f"all: mix {mix}, {duration:g} s, seed {seed}"
    header = Header(trace=mix, source="headgate trace make", made_up=made_up)
    _save(Trace(header, rows), out or Path(f"{mix}.jsonl.gz"))


@group.command("convert")
def convert_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to read.")],
    format_: FormatName,
    out: Out = None,
) -> None:
    """Turn a batch file, a benchmark's result or a CSV into a trace."""
    read = _known(convert.FORMATS, format_, "format")
    with _opened(file) as raw:
        found = read(raw, name=str(file))
    stem = file.name.split(".")[0]
    header = structs.replace(found.header, trace=stem, source=file.name)
    _save(Trace(header, found.arrivals), out or Path(f"{stem}.jsonl.gz"))


@group.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace in our format.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Rows, rate, burstiness, lengths and shared prefixes of a trace."""
    with _opened(file) as raw:
        found = trace.read(raw, name=str(file))
    shown = summary.summary(found.arrivals)
    if as_json:
        typer.echo(msgspec.json.encode(shown))
    else:
        Console().print(_facts(found.header, shown), _lengths(shown))


def _busier(work: generate.Work, factor: float, crowds: tuple[Crowd, ...]) -> generate.Work:
    arrivals = structs.replace(
        work.arrivals, rate_per_s=work.arrivals.rate_per_s * factor, crowds=crowds
    )
    return structs.replace(work, arrivals=arrivals)


def _known(table: Mapping[str, T], name: str, what: str) -> T:
    if name not in table:
        raise typer.BadParameter(f"{what} is {name!r}, wanted one of {', '.join(table)}")
    return table[name]


def _crowd(text: str) -> Crowd:
    try:
        start_s, end_s, times = (float(part) for part in text.split(":"))
    except ValueError:
        raise typer.BadParameter(
            f"crowd is {text!r}, wanted START:END:TIMES such as 60:90:5"
        ) from None
    return Crowd(start_s, end_s, times)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise FileError(f"cannot read {str(path)!r}: {error.strerror}") from None


def _save(found: Trace, path: Path) -> None:
    with replacing(path) as file:
        if path.suffix == ".gz":
            # No name and no time inside: same rows, same bytes.
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                packed.writelines(trace.written(found.header, found.arrivals))
        else:
            file.writelines(trace.written(found.header, found.arrivals))
    rate = workload.rate(found.arrivals)
    typer.echo(f"{path}: {len(found.arrivals)} requests, {rate:.2f}/s", err=True)


def _facts(header: Header, shown: Summary) -> Table:
    table = Table("trace", header.trace, show_header=True)
    cv = "-" if shown.arrival_cv is None else f"{shown.arrival_cv:.2f}"
    for name, value in (
        ("source", header.source or "-"),
        ("licence", header.licence or "-"),
        ("made up", header.made_up or "-"),
        ("requests", f"{shown.rows:,}"),
        ("duration", f"{shown.duration_s:,.1f} s"),
        ("rate", f"{shown.rate_per_s:.2f}/s"),
        ("arrival cv", f"{cv} (1 is Poisson)"),
        ("sessions", f"{shown.sessions:,}"),
        ("prefix share", f"{shown.prefix_share:.1%} of prompt tokens"),
        (
            "clients",
            ", ".join(f"{name} {n:,}" for name, n in list(shown.clients.items())[:8]) or "-",
        ),
    ):
        table.add_row(name, value)
    return table


def _lengths(shown: Summary) -> Table:
    table = Table("tokens", *(Spread.__struct_fields__))
    for name, spread in (("prompt", shown.prompt_tokens), ("output", shown.output_tokens)):
        if spread is not None:
            table.add_row(name, *(f"{value:,.0f}" for value in structs.astuple(spread)))
    return table
