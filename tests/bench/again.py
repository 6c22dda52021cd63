"""How near a recording's own policy comes when it is asked again: `python tests/bench/again.py [SEEDS]`.

A run of the lab, recorded, is fitted and run again under the same settings, on pools of every kind. The fit knows
nothing of the machines but what beats and rewards say.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec import structs

sys.path.append(str(Path(__file__).parents[1]))

from taped import asked_again, recorded_run, talk

from scheduler.sim import fleet
from scheduler.sim.arriving import Row
from scheduler.sim.fleet import EndpointSpec, Fault, Fleet
from scheduler.sim.world import World

SPAN_S = 60.0
RATES_RPS = 5.0, 15.0, 45.0
A100S = Fleet(name="three", endpoints=(EndpointSpec(profile="a100", count=3),))
PARTED = Fleet(
    name="parted",
    endpoints=(
        EndpointSpec(profile="a100", count=2, role="prefill", link_gbps=40.0),
        EndpointSpec(profile="a100", count=2, role="decode", link_gbps=40.0),
    ),
)
MOVED = structs.replace(
    A100S,
    faults=(
        Fault(at_s=15.0, endpoint="a100-0", kind="drain"),
        Fault(at_s=25.0, endpoint="a100-2", kind="join"),
        Fault(at_s=35.0, endpoint="a100-0", kind="resume"),
        Fault(at_s=45.0, endpoint="a100-1", kind="die"),
    ),
)
SERVED = ("base", "adapter"), ("base",), ("other",)


def as_written(row: Row) -> Row:
    return row


def of_models(row: Row) -> Row:
    models = ("base", "base", "adapter", "other", "other")
    return asking(row, model=models[int(row.request.session) % 5])


def by_session(row: Row) -> Row:
    return asking(row, blocks=())


def guessed(row: Row) -> Row:
    """Its client takes three tokens for four, and cuts its blocks by that."""
    said = asking(row, prompt_tokens=row.arrival.prompt_tokens * 4 // 3, prompt_estimated=True)
    return structs.replace(said, arrival=structs.replace(row.arrival, block_tokens=96))


def asking(row: Row, **fields: object) -> Row:
    return structs.replace(row, request=structs.replace(row.request, **fields))


KINDS: dict[str, tuple[Fleet, Callable[[Row], Row]]] = {
    "whole requests": (A100S, as_written),
    "two legs": (PARTED, as_written),
    "three models": (A100S, of_models),
    "drain, join, death": (MOVED, as_written),
    "sessions, no hashes": (A100S, by_session),
    "guessed lengths": (A100S, guessed),
}


def made(where: Fleet, change: Callable[[Row], Row], seed: int) -> tuple[fleet.Machine, ...]:
    """The machines of this seed, with their models."""
    found = fleet.machines(where, seed)
    if change is not of_models:
        return found
    return tuple(structs.replace(m, models=s) for m, s in zip(found, SERVED, strict=True))


def figures(run: World) -> tuple[float, float, float, float]:
    """Mean and P99 TTFT, mean TPOT in milliseconds, share of prompts cached."""
    done = [fate for fate in run.fates if fate.end == "completed"]
    ttft = np.array([fate.ttft_s for fate in done])
    tpot = np.array([fate.tpot_s for fate in done if fate.tpot_s is not None])
    cached = sum(f.cached_tokens for f in done) / sum(f.arrival.prompt_tokens for f in done)
    return (
        1e3 * float(ttft.mean()),
        1e3 * float(np.quantile(ttft, 0.99)),
        1e3 * float(tpot.mean()),
        cached,
    )


def rows(rate_rps: float, change: Callable[[Row], Row], seed: int) -> tuple[Row, ...]:
    """What arrives, as its clients wrote it."""
    return tuple(change(row) for row in talk(rate_rps, SPAN_S, seed=seed))


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    tell(f"{'':20} req/s   TTFT mean          P99        TPOT          hit     (ms; was, again)")
    for kind, (where, change) in KINDS.items():
        for rate_rps in RATES_RPS:
            was, now = [], []
            for seed in range(seeds):
                run, data = recorded_run(
                    seed,
                    where=where,
                    made=made(where, change, seed),
                    rows=rows(rate_rps, change, seed),
                )
                was.append(figures(run))
                now.append(figures(asked_again(data)))
            a, b = np.mean(was, axis=0), np.mean(now, axis=0)
            tell(
                f"{kind:20} {rate_rps:4.0f}  {a[0]:5.0f} {b[0]:5.0f} {b[0] / a[0] - 1:+5.0%}  "
                f"{a[1]:5.0f} {b[1]:5.0f}  {a[2]:5.1f} {b[2]:5.1f}  {a[3]:6.1%} {b[3]:6.1%}"
            )


if __name__ == "__main__":
    main()
