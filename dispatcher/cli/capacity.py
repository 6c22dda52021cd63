"""`headgate capacity`: how much a fleet can take, and how much fleet a rate needs."""

from collections.abc import Callable
from statistics import median
from typing import Annotated

import typer
from msgspec import structs
from rich.console import Console
from rich.table import Table

from dispatcher.cli import lab
from dispatcher.cli.lab import Bench, Cell
from scheduler.sim.fleet import ENDPOINTS_MAX
from scheduler.sim.lab import Lab

app = typer.Typer()

TURNS = 8
"Halvings: the rate is known to a half of one per cent of the fleet's capacity."


@app.command()
def capacity(
    *,
    trace: lab.TraceOption,
    policy: lab.PolicyOption = "plan",
    fleet: lab.FleetOption = "a30x8",
    slo: lab.SloOption = None,
    keep: Annotated[
        str, typer.Option(metavar="SHARE[,SHARE...]", help="Shares on time to keep.")
    ] = "0.99,0.9",
    rate: Annotated[
        float | None,
        typer.Option(
            min=lab.LEAST,
            max=lab.MOST,
            help="Find the smallest fleet for this rate: the given one, scaled in proportion.",
        ),
    ] = None,
    seeds: lab.SeedsOption = 3,
    slice_: lab.SliceOption = None,
    exact: lab.ExactOption = False,
    block_tokens: lab.BlockTokensOption = None,
    prompt_max: lab.PromptMaxOption = None,
    output_scale: lab.OutputScaleOption = 1.0,
    jobs: lab.JobsOption = None,
) -> None:
    """The highest rate that keeps promises, or with --rate the smallest fleet for it."""
    shares = lab.numbers(keep, "keep")
    if max(shares) > 1:
        raise typer.BadParameter(f"keep is {keep!r}, wanted shares of at most 1")
    stage = lab.stage(
        trace,
        fleet,
        slo=slo,
        slice_=slice_,
        exact=exact,
        block_tokens=block_tokens,
        prompt_max=prompt_max,
        output_scale=output_scale,
    )
    table = Table("policy", "on time", "requests a second" if rate is None else "endpoints")
    for name in lab.labels(policy):
        for share in shares:
            if rate is None:
                with Bench(stage, jobs) as bench:
                    found = f"{_highest_rate(bench, name, share, seeds):.2f}"
            else:
                found = _smallest_fleet(stage, name, share, rate_rps=rate, seeds=seeds, jobs=jobs)
            table.add_row(name, f"{share:.0%}", found)
    Console().print(table)


def _highest_rate(bench: Bench, name: str, share: float, seeds: int) -> float:
    """The highest rate at which the median seed keeps this share; 0 where even a trickle does not."""
    most = 2.0 * median(bench.capacities(seeds))

    def keeps(rate_rps: float) -> bool:
        found = bench.cells([Cell(name, seed, rate_rps, None) for seed in range(seeds)])
        return median(one.on_time for one in found) >= share

    return _bisected(keeps, most)


def _bisected(keeps: Callable[[float], bool], most: float) -> float:
    low, high = 0.0, most
    for _ in range(TURNS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def _smallest_fleet(
    stage: Lab, name: str, share: float, *, rate_rps: float, seeds: int, jobs: int | None
) -> str:
    """How many endpoints of the fleet's mix keep this share at this rate."""

    def keeps(times: int) -> bool:
        grown = tuple(structs.replace(spec, count=spec.count * times) for spec in unit.endpoints)
        fleet = structs.replace(unit, endpoints=grown)
        with Bench(structs.replace(stage, fleet=fleet), jobs) as bench:
            found = bench.cells([Cell(name, seed, rate_rps, None) for seed in range(seeds)])
        return median(one.on_time for one in found) >= share

    least = min(spec.count for spec in stage.fleet.endpoints)
    is_even = all(spec.count % least == 0 for spec in stage.fleet.endpoints)
    parts = tuple(
        structs.replace(spec, count=spec.count // least if is_even else spec.count)
        for spec in stage.fleet.endpoints
    )
    # Faults name endpoints that a smaller fleet need not have.
    unit = structs.replace(stage.fleet, endpoints=parts, faults=())
    high = 1
    while not keeps(high):
        high *= 2
        if high * unit.count > ENDPOINTS_MAX:
            return f"more than {ENDPOINTS_MAX}"
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return str(high * unit.count)
