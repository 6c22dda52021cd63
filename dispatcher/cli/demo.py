"""`headgate demo`: the whole system on this machine, under a load it can just carry, shown while it happens."""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from msgspec import structs
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dispatcher import demo as demos
from dispatcher.cli import download, output
from dispatcher.cli.output import seconds
from dispatcher.cli.status import share
from dispatcher.cli.up import fleet
from dispatcher.client import Client
from dispatcher.demo import COLD, Demo, Report, Spread
from dispatcher.stack import PROFILES, Stack, Wanted
from scheduler.errors import SettingsError
from scheduler.settings import Settings
from scheduler.sim import profile as engines
from scheduler.sim import trace as traces
from scheduler.sim.generate import MIXES, generated
from scheduler.sim.workload import Arrival, Promise, Workload, promised

app = typer.Typer()

LOOK_S = 1.0
"Between two pictures on a terminal."

LINE_S = 5.0
"Between two lines elsewhere."

LOAD = 0.65
"Deadlines bind, and most can be kept."

TIERS = (
    ("to 2k tokens", 2_000, Promise(ttft_s=0.5, tpot_s=0.05)),
    ("to 8k tokens", 8_000, Promise(ttft_s=2.0, tpot_s=0.05)),
    ("longer", 1 << 62, Promise(ttft_s=5.0, tpot_s=0.1)),
)
"""
For traces, which promise nothing, by the prompt's length: 0.5 s is a person in a chat, and less than any GPU here
needs to read 20,000 tokens. So is 50 ms a token what the smaller ones keep at a moderate batch only.
"""

JITTER = 0.15
"Of the emulated engines' coefficients, so that there is something to learn."

MIX_S = 600.0
"Of the generated mix, at its own rate: some 2,600 rows, of which the first are played."

BARS = " ▁▂▃▄▅▆▇█"


@app.command()
async def demo(
    settings: Settings,
    *,
    trace: Annotated[Path | None, typer.Option(help="A trace file; else a generated mix.")] = None,
    duration_s: Annotated[
        float, typer.Option("--seconds", min=5, max=60, help="Of arrivals, by the wall.")
    ] = 35.0,
    load: Annotated[
        float, typer.Option(min=0.001, max=100, help="Part of the fleet's capacity.")
    ] = LOAD,
    rate: Annotated[
        float | None, typer.Option(min=0.01, max=100_000, help="Requests a second instead.")
    ] = None,
    endpoints: Annotated[int, typer.Option(min=1, help="Emulated engines.")] = 4,
    profiles: Annotated[
        str, typer.Option(metavar="A,B,...", help="Hardware of the endpoints, in turn.")
    ] = ",".join(PROFILES),
    time_scale: Annotated[
        float,
        typer.Option(
            min=0.001, max=1000, help="Arrivals and engines, times faster than the wall clock."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the workload and the engines.")] = 0,
    svg: Annotated[Path | None, typer.Option(help="The last picture as a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as one line.")] = False,
) -> None:
    """Play a workload through the whole system on emulated engines."""
    hardware = fleet(endpoints, profiles)
    arrivals, what = _chosen(
        hardware, trace, duration_s=duration_s * time_scale, load=load, rate=rate, seed=seed
    )
    wanted = Wanted(profiles=hardware, time_scale=time_scale, seed=seed, jitter=JITTER)
    with contextlib.ExitStack() as open_:
        drawing = open_.enter_context(download.replacing(svg)) if svg is not None else None
        output.talk(what)
        scratch = open_.enter_context(tempfile.TemporaryDirectory(prefix="headgate-demo-"))
        # A private Redis and pool, also where the settings name one: a demo must not touch what runs.
        alone = msgspec.structs.replace(
            settings, pool="demo", redis=msgspec.structs.replace(settings.redis, url="")
        )
        stack = Stack(alone, wanted, directory=Path(scratch), told=output.talk)
        async with stack, Client.from_settings(stack.settings, name="demo") as client:
            running = stack.running
            output.talk(f"ready: {len(running.endpoints)} endpoints, redis {running.redis}")
            play = Demo(client, arrivals, model=running.models[0], time_scale=time_scale)
            report = await _shown(play)
        if drawing is not None:
            drawing.write(_drawn(report).encode())
    if as_json:
        output.json_line(report)
    else:
        output.console().print(picture(report))
    judge(report)


def judge(report: Report) -> None:
    """Exit with 1 where a single request has no terminal record."""
    if report.unended:
        output.talk(f"{report.unended} requests have no terminal record")
        raise typer.Exit(1)


def _chosen(
    hardware: Sequence[str],
    trace: Path | None,
    *,
    duration_s: float,
    load: float,
    rate: float | None,
    seed: int,
) -> tuple[Workload, str]:
    """What is played, and what to say of it."""
    if trace is None:
        rows: Workload = generated(MIXES["demo"], duration_s=MIX_S, rng=np.random.default_rng(seed))
        name = "mix demo"
    else:
        rows, name = _rows(trace), trace.name
    carried = demos.capacity([engines.load(one) for one in hardware], rows)
    wanted = rate if rate is not None else load * carried
    window = demos.fitted(rows, rate_per_s=wanted, duration_s=duration_s)
    if not window:
        raise SettingsError(f"{name} has no arrival in {duration_s:g} s, wanted some")
    return window, (
        f"{name}: first {len(window)} of {len(rows)} rows at {wanted:.1f}/s, "
        f"{wanted / carried:.2f} of about {carried:.1f}/s that {', '.join(hardware)} can carry"
    )


def _rows(path: Path) -> Workload:
    try:
        with path.open("rb") as file:
            rows = traces.read(file, name=path.name).arrivals
    except OSError as error:
        raise SettingsError(f"trace {str(path)!r} cannot be read: {error.strerror}") from None
    except traces.TraceError as error:
        raise SettingsError(str(error)) from None
    has_promise = any(row.ttft_s or row.deadline_s for row in rows)
    return rows if has_promise else tuple(_tiered(row) for row in rows)


def _tiered(row: Arrival) -> Arrival:
    name, _, promise = next(tier for tier in TIERS if row.prompt_tokens <= tier[1])
    [row] = promised([row], promise)
    return structs.replace(row, client=name)


async def _shown(play: Demo) -> Report:
    """Run it, and show how it goes: a picture on a terminal, lines elsewhere."""
    running = asyncio.create_task(play.run())
    is_live = sys.stderr.isatty()
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while not running.done():
            await asyncio.wait([running], timeout=LOOK_S if is_live else LINE_S)
            if is_live:
                live.update(picture(play.report()), refresh=True)
            else:
                output.talk(_line(play.report()))
    return await running


def _line(report: Report) -> str:
    kept = [c.on_time for c in report.classes if c.on_time is not None]
    ttft = "-" if report.ttft is None else seconds(report.ttft.p50)
    error = next((e for e in reversed(report.errors) if e is not None), None)
    ended = sum(report.outcomes.values())
    return (
        f"{report.at_s:5.0f} s: {report.sent}/{report.total} sent, {ended} ended, "
        f"TTFT P50 {ttft}, on time {share(min(kept, default=None))} (worst class), "
        f"prediction off by {share(error)}"
    )


def picture(report: Report) -> RenderableType:
    """Everything at one glance."""
    scale = "" if report.time_scale == 1 else f", {report.time_scale:g} times as fast as the wall"
    ended = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.items())
    head = Text(
        f"{report.at_s:.0f} s of the workload's time{scale}: {report.sent} of {report.total} sent; "
        f"{ended or 'none ended'}; {report.unended} under way"
    )
    bars = "".join(_bar(e) for e in report.errors)
    learned = Text(
        f"predicted first token off by {share(report.error_cold)} over the first {COLD} requests, "
        f"{share(report.error_warm)} since; each {report.error_stretch_s:.0f} s: {bars}"
    )
    late = Text(f"requests were sent at most {seconds(report.late_s)} late (P99)")
    return Group(
        head,
        _promise_table(report),
        _time_table(report),
        _endpoint_table(report),
        learned,
        late,
    )


def _bar(error: float | None) -> str:
    if error is None:
        return " "
    return BARS[min(len(BARS) - 1, 1 + int(error * (len(BARS) - 1)))]


def _promise_table(report: Report) -> Table:
    table = Table("work", "promise", "ended", "on time", box=None)
    for one in report.classes:
        ended = f"{one.ended}/{one.sent}"
        table.add_row(one.name, one.promise or "-", ended, share(one.on_time))
    return table


def _time_table(report: Report) -> Table:
    head = ("work", "TTFT mean", "P50", "P90", "P99", "TPOT mean", "P50", "P90", "P99")
    table = Table(*head, box=None)
    for one in report.classes:
        table.add_row(one.name, *_cells(one.ttft), *_cells(one.tpot))
    table.add_row("all", *_cells(report.ttft), *_cells(report.tpot), style="bold")
    return table


def _endpoint_table(report: Report) -> Table:
    table = Table("endpoint", "served", "prompt", "cached", "output", "off by", box=None)
    for one in report.endpoints:
        cached = share(one.cached_tokens / one.prompt_tokens if one.prompt_tokens else None)
        numbers = (str(one.served), str(one.prompt_tokens), cached, str(one.output_tokens))
        table.add_row(one.name, *numbers, share(one.prediction_error))
    return table


def _cells(spread: Spread | None) -> tuple[str, str, str, str]:
    if spread is None:
        return ("-", "-", "-", "-")
    return (
        seconds(spread.mean),
        seconds(spread.p50),
        seconds(spread.p90),
        seconds(spread.p99),
    )


def _drawn(report: Report) -> str:
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=120, file=nowhere)
        console.print(picture(report))
        return console.export_svg(title="headgate demo")
