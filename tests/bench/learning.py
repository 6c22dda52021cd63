"""How soon it has learned: `python tests/bench/learning.py [SEEDS]`.

Each run is paired with one over the same arrivals and machines whose core knows already: started from the other's
snapshot (cold start), or with an endpoint that was slow from the beginning (slow-down). Told is from when on the rolling
mean of the time to first token stays within 10 % of the pair's.
"""

import sys

import msgspec
import numpy as np
from msgspec import structs

from scheduler.core import CoreSettings, Scheduler
from scheduler.sim import fleet, workload, world
from scheduler.sim.fleet import EndpointSpec, Fault, Fleet
from scheduler.sim.world import World

SPAN_S = 150.0
SLOW_AT_S = 60.0
WINDOW_S = 20.0
PART = 0.10
RATE_RPS = 21.0
"About 0.7 of what two A100 and two L40S can take of these."


class Told(msgspec.Struct, frozen=True):
    """From when on it was as good as the one who knew."""

    seconds: float
    samples: int
    mean_s: float
    known_s: float
    "Mean seconds to the first token, of it and of the one who knew, from the beginning or the fault on."


def pair(hardware: str | None) -> Fleet:
    """Two A100 and two L40S; the latter may declare another class than they are."""
    return Fleet(
        name="pair",
        endpoints=(
            EndpointSpec(profile="a100", count=2),
            EndpointSpec(profile="l40s", count=2, hardware=hardware),
        ),
    )


def rows(seed: int, span_s: float) -> tuple[world.Row, ...]:
    rng = np.random.default_rng(seed)
    n = int(RATE_RPS * span_s)
    return world.rows(
        tuple(
            workload.Arrival(
                at_s=float(at),
                prompt_tokens=int(np.clip(rng.lognormal(6.8, 1.0), 16, 12_000)),
                output_tokens=int(np.clip(rng.lognormal(4.5, 0.8), 2, 800)),
            )
            for at in np.sort(rng.uniform(0, span_s, n))
        )
    )


def run(where: Fleet, seed: int, *, known: Scheduler | None = None):
    """The run's fates, and its core."""
    core = Scheduler(CoreSettings(), np.random.default_rng(seed))
    if known is not None:
        assert core.restore(known.snapshot())
    played = World(
        rows(seed, SPAN_S),
        fleet.machines(where, seed),
        delays=where.delays,
        is_open=False,
        faults=where.faults,
    )
    played.run(core)
    return played.fates, core


def told(fates, known, *, since_s: float) -> Told:
    """When the one has caught up with the other for good."""
    at = np.array([fate.enqueued_at for fate in fates])
    ours, theirs = (np.array([fate.ttft_s for fate in each]) for each in (fates, known))
    last = since_s
    for moment in np.arange(since_s + 1.0, at[-1], 1.0):
        window = (at > max(since_s, moment - WINDOW_S)) & (at <= moment)
        if window.any() and ours[window].mean() > (1 + PART) * theirs[window].mean():
            last = moment
    after = at > since_s
    return Told(
        seconds=float(last - since_s),
        samples=int(((at > since_s) & (at <= last)).sum()),
        mean_s=float(ours[after].mean()),
        known_s=float(theirs[after].mean()),
    )


def cold(seed: int, hardware: str | None = None, *, since_s: float = 0.0) -> Told:
    """From a cold start; `hardware` is what the L40S declare."""
    where = pair(hardware)
    fates, core = run(where, seed)
    known, _ = run(where, seed, known=core)
    return told(fates, known, since_s=since_s)


def slowed(seed: int, *, since_s: float = 0.0) -> Told:
    """After an A100 has become three times slower, or so many seconds after that."""
    fault = Fault(at_s=SLOW_AT_S, endpoint="a100-0", kind="slow", factor=3.0)
    fates, _ = run(structs.replace(pair(None), faults=(fault,)), seed)
    early = structs.replace(fault, at_s=0.0)
    known, _ = run(structs.replace(pair(None), faults=(early,)), seed)
    return told(fates, known, since_s=SLOW_AT_S + since_s)


CASES = {
    "cold start": cold,
    "cold start, L40S declared as L4 (2.3 times slower)": lambda seed: cold(seed, "l4"),
    "an A100 three times slower": slowed,
}


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name, case in CASES.items():
        found = [case(seed) for seed in range(seeds)]
        seconds = ", ".join(f"{one.seconds:.0f}" for one in found)
        samples = ", ".join(str(one.samples) for one in found)
        ratio = float(np.median([one.mean_s / one.known_s for one in found]))
        sys.stdout.write(
            f"{name}: within {PART:.0%} after {seconds} s ({samples} samples); mean {ratio:.3f} times\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
