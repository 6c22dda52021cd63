"""How soon it has learned: `python tests/bench/learning.py [SEEDS]`, or with real traces `... SEEDS TRACES [CELL...]`,
and there with `--policy plan,lodestar` whoever else learns.

Each run is paired with one over the same arrivals and machines by the same policy, which knows already: started from
what the other has learned (cold start, join, other work), or with an endpoint that was slow or gone from the beginning.
Told is from when on the rolling mean of the time to first token stays within 10 % of the pair's. A trace's own load
comes and goes, so its mean is held against the pair's and not against what it is at the end.
"""

import argparse
import functools
import sys
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs

from scheduler.core import CoreSettings, Scheduler
from scheduler.sim import arriving, catalogue, cells, fleet, policy, trace, workload
from scheduler.sim.arriving import Row
from scheduler.sim.baselines.lodestar import Lodestar
from scheduler.sim.cells import Cell
from scheduler.sim.fleet import EndpointSpec, Fault, Fleet
from scheduler.sim.lab import Lab
from scheduler.sim.policies.base import LabPolicy
from scheduler.sim.promise import Promised
from scheduler.sim.world import Dispatch, World

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


def rows(seed: int, span_s: float) -> tuple[Row, ...]:
    rng = np.random.default_rng(seed)
    n = int(RATE_RPS * span_s)
    return arriving.rows(
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


def told(fates, known, *, since_s: float, window_s: float = WINDOW_S) -> Told:
    """When the one has caught up with the other for good."""
    at = np.array([fate.enqueued_at for fate in fates])
    ours, theirs = (np.array([fate.ttft_s for fate in each], float) for each in (fates, known))
    served = np.isfinite(ours) & np.isfinite(theirs)  # a window's last ones may not have ended
    at, ours, theirs = at[served], ours[served], theirs[served]
    last = since_s
    for moment in np.arange(since_s + 1.0, at[-1], 1.0):
        window = (at > max(since_s, moment - window_s)) & (at <= moment)
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


# The same on the evaluation's cells, in the part of the trace where policies are tuned.

CELLS = {
    "A1-conv": (EndpointSpec(profile="a30", count=4), EndpointSpec(profile="a30", count=4)),
    "A2-mixed": catalogue.named("mixed-h100-a100-l40s").endpoints,
}
"Their fleets; the last kind is the one that may declare what it is not, and that joins and dies."

WRONG = {"a30": "a100", "l40s": "l4"}
"Classes about twice as fast, and half as fast: 2.05 and 2.3 times."

LOAD = 0.7
CELL_END_S, CELL_WINDOW_S = 740.0, 60.0
"Of the trace, which is played faster or slower than it was; and of the rolling mean."

FAULT_PART = 0.4
"Of the run: then it happens."


LEARNERS = ("plan", "lodestar", "llm-d-predicted", "earliest-finish")
"Who learns; the last two by the cost model that ships, without the plan."


class Starting(LabPolicy, frozen=True, tag="starting"):
    """Another policy, from what one of its kind has learned; what it made can be had afterwards."""

    who: str
    known: Dispatch | None = None
    made: list[Dispatch] = msgspec.field(default_factory=list)

    @property
    def is_open(self):
        return policy.named(self.who).is_open

    @property
    def scrapes(self):
        return policy.named(self.who).scrapes

    def dispatch(self, stage):
        found = policy.named(self.who).dispatch(stage)
        if self.known is not None:
            hand_over(self.known, found)
        self.made.append(found)
        return found


def hand_over(old: Dispatch, new: Dispatch) -> None:
    """What one has learned, to another that has not begun."""
    if isinstance(old, Scheduler):
        assert new.restore(old.snapshot())
    elif isinstance(old._router, Lodestar):
        for field in ("_network", "_shift", "_scale", "_answers"):
            setattr(new._router, field, getattr(old._router, field))
    else:
        assert new._desk.predictor.restore(old._desk.predictor.export(()))


class OnCell:
    """One cell's tuning window, with one seed, under one policy."""

    def __init__(self, name: str, cell: Cell, read, seed: int, who: str = "plan") -> None:
        self.name, self.read, self.seed, self.who = name, read, seed, who
        self.kinds = CELLS[name]
        self.cell = structs.replace(
            cell, windows=(0.0,), window_s=CELL_END_S, run_in_s=0.0, fleet="", endpoints=self.kinds
        )
        lab = self.lab()
        self.rate_rps = LOAD * lab.capacity_rps(seed)
        self.fault_s = FAULT_PART * len(lab.work.arrivals) / self.rate_rps
        last = self.kinds[-1]
        self.one = f"{last.name or last.profile}-{sum(k.count for k in self.kinds if k.profile == last.profile) - 1}"

    def lab(self, **changes):
        return cells.lab(self.name, structs.replace(self.cell, **changes), 0, self.read)

    def run(self, known: Dispatch | None = None, **changes):
        return self.played(self.lab(**changes), self.rate_rps, known)

    def played(self, lab: Lab, rate_rps: float, known: Dispatch | None = None):
        chosen = Starting(who=self.who, known=known, made=[])
        _, done = lab.run(chosen, label=self.who, seed=self.seed, rate_rps=rate_rps)
        return done.fates, chosen.made[-1]

    def cold(self, **changes) -> Told:
        fates, core = self.run(**changes)
        known, _ = self.run(core, **changes)
        return told(fates, known, since_s=0.0, window_s=CELL_WINDOW_S)

    def wrong(self) -> Told:
        """The last kind declares another class."""
        last = structs.replace(self.kinds[-1], hardware=WRONG[self.kinds[-1].profile])
        return self.cold(endpoints=(*self.kinds[:-1], last))

    def slowed(self) -> Told:
        return self.befallen("slow", factor=3.0)

    def died(self) -> Told:
        return self.befallen("die")

    def joined(self) -> Told:
        """One comes that nobody has seen before; the pair's core has."""
        faults = (Fault(at_s=self.fault_s, endpoint=self.one, kind="join"),)
        fates, core = self.run(faults=faults)
        known, _ = self.run(core, faults=faults)
        return told(fates, known, since_s=self.fault_s, window_s=CELL_WINDOW_S)

    def turned(self) -> Told:
        """From one moment on it is other work: agents, nearly all prefix, where there were conversations."""
        lab = self.lab()
        agents = cells.Part(trace="agent_miniswe")
        later = self.lab(parts=(agents,), window_s=CELL_END_S)
        first = workload.scaled(lab.work.arrivals, rate_per_s=self.rate_rps)
        begin_s = first[-1].at_s
        second = workload.scaled(
            later.work.arrivals, rate_per_s=LOAD * later.capacity_rps(self.seed)
        )
        second = tuple(structs.replace(a, at_s=begin_s + a.at_s) for a in second)
        both = workload.merged(first, second)
        lab = structs.replace(lab, work=Promised(both))
        rate_rps = workload.rate(both)
        fates, made = self.played(lab, rate_rps)
        known, _ = self.played(lab, rate_rps, made)
        return told(fates, known, since_s=begin_s, window_s=CELL_WINDOW_S)

    def befallen(self, kind: str, **how) -> Told:
        """What befalls one in the middle has befallen the pair's from the beginning."""
        fault = Fault(at_s=self.fault_s, endpoint=self.one, kind=kind, **how)
        fates, _ = self.run(faults=(fault,))
        known, _ = self.run(faults=(structs.replace(fault, at_s=0.0),))
        return told(fates, known, since_s=self.fault_s, window_s=CELL_WINDOW_S)


CELL_CASES = {
    "cold start": OnCell.cold,
    "cold start, half declared twice as fast (A1) or slow (A2)": OnCell.wrong,
    "one three times slower": OnCell.slowed,
    "one joins": OnCell.joined,
    "one dies": OnCell.died,
    "agents after conversations": OnCell.turned,
}


def reader(traces: Path):
    """Arrivals of a trace by its name."""

    @functools.cache
    def arrivals(name: str):
        path = next(traces.glob(f"{name}.jsonl*"))
        with path.open("rb") as raw:
            return trace.read(raw, name=str(path)).arrivals

    return arrivals


def say(name: str, found: list[Told]) -> None:
    seconds = ", ".join(f"{one.seconds:.0f}" for one in found)
    samples = ", ".join(str(one.samples) for one in found)
    ratio = float(np.median([one.mean_s / one.known_s for one in found]))
    sys.stdout.write(
        f"{name}: within {PART:.0%} after {seconds} s ({samples} samples); mean {ratio:.3f} times\n"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", type=int, nargs="?", default=5)
    parser.add_argument("traces", type=Path, nargs="?")
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--policy", default="plan", help=f"some of {','.join(LEARNERS)}")
    asked = parser.parse_args()
    seeds = range(asked.seeds)
    if asked.traces is None:
        for name, case in CASES.items():
            say(name, [case(seed) for seed in seeds])
        return
    read, shipped = reader(asked.traces), cells.shipped()
    for cell in asked.cells or CELLS:
        for who in asked.policy.split(","):
            stages = [OnCell(cell, shipped.cells[cell], read, seed, who) for seed in seeds]
            for name, case in CELL_CASES.items():
                say(f"{cell}, {name}, {who}", [case(stage) for stage in stages])


if __name__ == "__main__":
    main()
