"""`headgate simulate`: policies on a trace and a fleet, in virtual time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec import structs
from rich.console import Console
from rich.table import Table

from dispatcher.cli import download, lab
from dispatcher.cli.lab import Bench, Cell
from scheduler.sim.report import Report

app = typer.Typer()


@app.command()
def simulate(
    *,
    trace: lab.TraceOption,
    policy: lab.PolicyOption = "plan",
    fleet: lab.FleetOption = "a30x8",
    load: Annotated[
        str | None,
        typer.Option(metavar="X[,X...]", help="Multiples of the fleet's measured capacity."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="R[,R...]", help="Requests a second, instead of --load.")
    ] = None,
    seeds: lab.SeedsOption = 1,
    out: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT", help="A list, one object a cell and seed."),
    ] = None,
    slo: lab.SloOption = None,
    slice_: lab.SliceOption = None,
    cut: lab.CutOption = 0.0,
    closed: lab.ClosedOption = False,
    exact: lab.ExactOption = False,
    zero_delay: lab.ZeroDelayOption = False,
    block_tokens: lab.BlockTokensOption = None,
    prompt_max: lab.PromptMaxOption = None,
    output_scale: lab.OutputScaleOption = 1.0,
    lengths: lab.LengthsOption = "unknown",
    curves: Annotated[
        bool, typer.Option("--curves", help="Also what `compare` needs for its pictures.")
    ] = False,
    untimed: Annotated[
        bool,
        typer.Option("--untimed", help="Do not measure our own time: same seed, same bytes."),
    ] = False,
    jobs: lab.JobsOption = None,
) -> None:
    """What would these policies do with this traffic on this fleet?"""
    if (load is None) == (rate is None):
        raise typer.BadParameter(f"load is {load!r} and rate {rate!r}, wanted exactly one of them")
    names = lab.labels(policy)
    loads = None if load is None else lab.numbers(load, "load")
    rates = [] if rate is None else lab.numbers(rate, "rate")
    stage = lab.stage(
        trace,
        fleet,
        slo=slo,
        slice_=slice_,
        cut=cut,
        closed=closed,
        exact=exact,
        zero_delay=zero_delay,
        block_tokens=block_tokens,
        prompt_max=prompt_max,
        output_scale=output_scale,
        lengths=lengths,
    )
    with Bench(stage, jobs) as bench:
        capacities = None if loads is None else bench.capacities(seeds)
        places = [
            (seed, value if capacities is None else value * capacities[seed], value)
            for value in loads or rates
            for seed in range(seeds)
        ]
        bounds = bench.bounds([(seed, rate_rps) for seed, rate_rps, _ in places])
        plan = [
            Cell(name, seed, rate_rps, value if loads else None, curves, not untimed)
            for name in names
            for seed, rate_rps, value in places
        ]
        found = bench.cells(plan)
    reports = [
        structs.replace(
            one,
            ttft_mean_bound_s=bounds[at % len(places)].ttft_mean_s,
            on_time_bound=bounds[at % len(places)].on_time,
            capacity_rps=None if capacities is None else capacities[one.seed],
        )
        for at, one in enumerate(found)
    ]
    if out is not None:
        with download.replacing(out) as file:
            file.write(msgspec.json.format(msgspec.json.encode(reports), indent=1) + b"\n")
    show(reports)


def show(reports: list[Report]) -> None:
    """A line a cell: the mean over its seeds. `headgate compare` says how sure it is."""
    table = Table(
        "policy", "load", "req/s", "on time", "TTFT mean", "P50", "P99", "TPOT", "hit", "us/decide"
    )
    groups: dict[tuple[str, float], list[Report]] = {}
    for one in reports:
        groups.setdefault((one.policy, one.load or one.rate_rps), []).append(one)
    for (name, _), group in groups.items():
        table.add_row(
            name,
            "-" if group[0].load is None else f"{group[0].load:g}",
            f"{_mean([one.rate_rps for one in group]):.2f}",
            f"{_mean([one.on_time for one in group]):.1%}",
            *(
                f"{_mean([getattr(one, key) for one in group]):.3f}"
                for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_mean_s")
            ),
            f"{_mean([one.cache_hit for one in group]):.1%}",
            f"{_mean([one.decide_us_p50 for one in group]):.0f}",
        )
    bound = {one.load or one.rate_rps: one for one in reports if one.ttft_mean_bound_s is not None}
    console = Console()
    console.print(table)
    if any(one.by_tenant for one in reports):
        console.print(_by_tenant(groups))
    for value, one in bound.items():
        on_time = "" if one.on_time_bound is None else f", on time at most {one.on_time_bound:.1%}"
        console.print(
            f"at {value:g}: nobody can have a mean TTFT below {one.ttft_mean_bound_s:.3f} s{on_time}"
        )


def _by_tenant(groups: dict[tuple[str, float], list[Report]]) -> Table:
    """A line a tenant: what it got, and what it would have if as many on time were shared fairly."""
    table = Table("policy", "load", "tenant", "requests", "on time", "fair", "TTFT mean", "P99")
    for (name, value), group in groups.items():
        for tenant in group[0].by_tenant:
            own = [one.by_tenant[tenant] for one in group]
            table.add_row(
                name,
                f"{value:g}",
                tenant,
                f"{_mean([one.n for one in own]):.0f}",
                f"{_mean([one.on_time for one in own]):.1%}",
                f"{_mean([one.on_time_fair for one in own]):.1%}",
                f"{_mean([one.ttft_mean_s for one in own]):.3f}",
                f"{_mean([one.ttft_p99_s for one in own]):.3f}",
            )
    return table


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")
