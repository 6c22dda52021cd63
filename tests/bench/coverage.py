"""How often first tokens come no later than the quantiles said: `python tests/bench/coverage.py TRACES [CELL...]`.

Each cell of the evaluation is played by the shipped core at each of its loads, over the part of the trace where policies
are tuned (before second 740). Every completion after the first 500 is held against the quantiles that were said when it
was handed over; told are the shares that they covered, in all, behind each predicted wait, and at the endpoint where
that was furthest off.
"""

import functools
import sys
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs

from scheduler import forecast, spread
from scheduler.core import Scheduler
from scheduler.forecast import PARTS, Forecast
from scheduler.sim import cells, trace
from scheduler.sim.cells import Cell
from scheduler.sim.policies import ours
from scheduler.wire.worker import Reward

CELLS = ("A1-conv", "A2-mixed", "K1-conv", "K3-small")
BEGIN_S, END_S = 40.0, 740.0
FIRST = 500
"Completions after which the bar holds."

BAR = (0.88, 0.92)


class Told(msgspec.Struct, frozen=True):
    """One run: for each of `PARTS` the share covered."""

    n: int
    median_error: float
    "Median of |log(actual / predicted)|."
    all: tuple[float, ...]
    bands: dict[str, tuple[float, ...]]
    furthest: float
    "Of the endpoints with a hundred completions the 90 % share that is furthest off."


class Heard:
    """The shipped core, and what it was told of its predictions."""

    def __init__(self, core: Scheduler) -> None:
        self._core = core
        self.heard: list[tuple[str, Forecast]] = []
        self.decide, self.wakeup_at = core.decide, core.wakeup_at

    def receive(self, event, now):
        if isinstance(event, Reward) and (seen := forecast.read(event)) and seen.covered:
            self.heard.append((event.endpoint, seen))
        self._core.receive(event, now)


class Listening(ours.Plan, frozen=True, tag="listening"):
    """`plan`, with an ear to its core."""

    heard: list[Heard] = msgspec.field(default_factory=list)

    def dispatch(self, stage):
        self.heard.append(Heard(super().dispatch(stage)))
        return self.heard[-1]


def play(cell: Cell, name: str, read, *, load: float, seed: int, end_s: float = END_S) -> Told:
    """One run of a cell's tuning window."""
    cell = structs.replace(
        cell, windows=(BEGIN_S,), run_in_s=BEGIN_S, window_s=end_s - BEGIN_S, policies=("plan",)
    )
    lab = cells.lab(name, cell, 0, read)
    listening = Listening(heard=[])
    rate_rps = load * lab.capacity_rps(seed)
    lab.run(listening, label="plan", seed=seed, rate_rps=rate_rps)
    return told(listening.heard[-1].heard[FIRST:])


def told(heard: list[tuple[str, Forecast]]) -> Told:
    """The shares of these."""
    by_band, by_endpoint = defaultdict(list), defaultdict(list)
    for endpoint, seen in heard:
        by_band[spread.band(seen.start_s)].append(seen.covered)
        by_endpoint[endpoint].append(seen.covered[-1])
    ninths = [float(np.mean(own)) for own in by_endpoint.values() if len(own) >= 100]
    return Told(
        n=len(heard),
        median_error=float(np.median([abs(np.log(s.seconds / s.predicted_s)) for _, s in heard])),
        all=_shares([seen.covered for _, seen in heard]),
        bands={name: _shares(by_band[name]) for name in spread.BANDS if len(by_band[name]) >= 100},
        furthest=max(ninths, key=lambda share: abs(share - PARTS[-1]), default=float("nan")),
    )


def _shares(covered: list[tuple[bool, ...]]) -> tuple[float, ...]:
    return tuple(np.mean(np.array(covered, dtype=float), axis=0).tolist())


def reader(traces: Path):
    """Arrivals of a trace by its name."""

    @functools.cache
    def arrivals(name: str):
        path = next(traces.glob(f"{name}.jsonl*"))
        with path.open("rb") as raw:
            return trace.read(raw, name=str(path)).arrivals

    return arrivals


def main() -> None:
    read, names = reader(Path(sys.argv[1])), sys.argv[2:] or list(CELLS)
    sys.stdout.write(f"wanted: {BAR[0]:.0%} to {BAR[1]:.0%} within q90\n\n")
    sys.stdout.write(
        "| cell | load | n | off by | q50 covers | q90 covers | by wait | furthest |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for name, cell in cells.shipped().named(names).items():
        for load in cell.loads:
            one = play(cell, name, read, load=load, seed=0)
            bands = ", ".join(f"{band} {shares[-1]:.1%}" for band, shares in one.bands.items())
            sys.stdout.write(
                f"| {name} | {load:g} | {one.n} | {one.median_error:.1%} | {one.all[0]:.1%} | "
                f"{one.all[1]:.1%} | {bands} | {one.furthest:.1%} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
