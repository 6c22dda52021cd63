"""The whole evaluation at a glance: a verdict a place, and what they come to by family of cells.

A place is a cell at a load. There ours stands beside the best of its peers, whoever that is at that place, chosen by
its median in the very draws that are told: the choice favours the peer. A peer that was run in fewer draws than ours
and the baseline have in common takes no part, and is named.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from scheduler.sim import contrast
from scheduler.sim.contrast import Draw, Estimate, Figures, Mark

AHEAD_RATIO, AHEAD_POINTS = 1.05, 0.01
"From here on ours is ahead of the best peer."

JUDGED_RUNS = 4
"Of fewer an interval is hardly more than the runs themselves: nothing is won or lost."

TAIL_RUNS = 20
"No ratio of P99s is told of fewer runs."


class Sides(msgspec.Struct, frozen=True, kw_only=True):
    """Who is judged, and beside whom."""

    ours: str
    oracle: str
    "Shown, but nobody's peer."
    is_peer: Callable[[str], bool]
    "Whether a policy of this label could be run in place of ours."


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What has been run of a cell, by one figure."""

    name: str
    baseline: str
    figures: Figures

    @property
    def family(self) -> str:
        """`K1` of `K1-conv`."""
        return self.name.split("-")[0]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Ours at one place. What compares is a value a draw: above 1, or above 0, ours is better."""

    cell: Cell
    place: float
    draws: tuple[Draw, ...]
    "Those that ours and the baseline have in common; all figures here are of these."
    ours: Estimate
    over_baseline: tuple[float, ...]
    peer: str | None
    "The best one; None where none was run in all draws."
    peer_value: float | None
    over_peer: tuple[float, ...]
    oracle: float | None
    bound: float | None
    closed_gap: float | None
    "Of the way from the baseline to the bound."
    closed_rest: float | None
    "Of the way from the best peer to the bound."
    left_out: Mapping[str, int]
    "Peers that were run in fewer draws, and in how many."

    @property
    def mark(self) -> Mark | None:
        """Against the best peer; None where there is none, or where the runs are too few to be sure of anything."""
        if len(self.over_peer) < JUDGED_RUNS:
            return None
        return contrast.mark(
            contrast.bootstrap(self.over_peer), is_ratio=self.cell.figures.is_ratio
        )


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What places of one family come to, by one figure."""

    name: str
    metric: str
    baseline: str
    is_ratio: bool
    n_places: int
    n_runs: tuple[int, int]
    "Of the place with the fewest, and of that with the most."
    over_baseline: Estimate
    "The geometric mean of ratios, or the mean of differences."
    over_peer: Estimate | None
    marks: Mapping[Mark, int]
    "Places of each, where there were enough runs."
    n_beside_peer: int
    n_ahead: int
    "Of those that have a best peer, places where ours is at least `AHEAD_RATIO` times as good as the best peer, or `AHEAD_POINTS` better."
    worst: Verdict | None
    "Where ours stands least well beside the best peer."


def verdicts(cell: Cell, sides: Sides) -> list[Verdict]:
    """Each place of a cell that was run: a tail's with at least `TAIL_RUNS` draws, any other with one."""
    least = TAIL_RUNS if is_tail(cell.figures.metric) else 1
    shared = {
        place: _shared(by_policy, sides.ours, cell.baseline)
        for place, by_policy in cell.figures.values.items()
    }
    return [
        _verdict(cell, place, draws, sides)
        for place, draws in shared.items()
        if len(draws) >= least
    ]


def families(found: Sequence[Verdict]) -> list[Family]:
    """The same by family, figure and baseline, in the order in which they first come."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for one in found:
        cell = one.cell
        groups.setdefault((cell.family, cell.figures.metric, cell.baseline), []).append(one)
    return [_family(*key, members) for key, members in groups.items()]


def overall(places: Sequence[Sequence[float]], *, is_ratio: bool) -> Estimate:
    """The geometric mean of the places' median ratios, or the mean of their median differences, with its interval.

    All places are resampled by the same draws, as far as they have as many.
    """
    medians = [float(np.median(values)) for values in places]
    drawn = np.array([contrast.resampled(values) for values in places])
    means = np.exp(np.log(drawn).mean(axis=0)) if is_ratio else drawn.mean(axis=0)
    return contrast.estimate(contrast.overall(medians, is_ratio=is_ratio), means)


def over_baseline(found: Sequence[Verdict]) -> dict[str, tuple[float, int]]:
    """Every policy's overall figure beside the baseline, and of how many of these places it is.

    A policy counts where it was run in all draws of the verdict.
    """
    medians: dict[str, list[float]] = {}
    for one in found:
        figures = one.cell.figures
        by_policy = _complete(figures.values[one.place], one.draws)
        base = by_policy[one.cell.baseline]
        for policy, values in by_policy.items():
            versus = figures.paired(values, base)
            medians.setdefault(policy, []).append(float(np.median(versus)))
    is_ratio = bool(found) and found[0].cell.figures.is_ratio
    return {
        policy: (contrast.overall(values, is_ratio=is_ratio), len(values))
        for policy, values in medians.items()
    }


def is_tail(metric: str) -> bool:
    """Whether a figure hangs on a few requests of each run."""
    return "p99" in metric


def _verdict(cell: Cell, place: float, draws: tuple[Draw, ...], sides: Sides) -> Verdict:
    figures, by_policy = cell.figures, cell.figures.values[place]
    complete = _complete(by_policy, draws)
    sign = 1.0 if figures.less_is_better else -1.0
    peers = [name for name in complete if sides.is_peer(name)]
    peer = min(peers, key=lambda name: sign * _median(complete[name]), default=None)
    mine, base = complete[sides.ours], complete[cell.baseline]
    theirs = {} if peer is None else complete[peer]
    bounds = figures.bounds.get(place, {})
    known = [bounds[draw] for draw in draws if draw in bounds]
    return Verdict(
        cell=cell,
        place=place,
        draws=draws,
        ours=contrast.bootstrap(list(mine.values())),
        over_baseline=tuple(figures.paired(mine, base)),
        peer=peer,
        peer_value=_median(theirs) if theirs else None,
        over_peer=tuple(figures.paired(mine, theirs)),
        oracle=_median(complete[sides.oracle]) if sides.oracle in complete else None,
        bound=float(np.median(known)) if known else None,
        closed_gap=contrast.closed_gap(mine, base, bounds),
        closed_rest=contrast.closed_gap(mine, theirs, bounds),
        left_out={
            name: sum(draw in values for draw in draws)
            for name, values in by_policy.items()
            if sides.is_peer(name) and name not in complete
        },
    )


def _family(name: str, metric: str, baseline: str, found: Sequence[Verdict]) -> Family:
    is_ratio = found[0].cell.figures.is_ratio
    judged = [one for one in found if one.over_peer]
    medians = [float(np.median(one.over_peer)) for one in judged]
    ahead = AHEAD_RATIO if is_ratio else AHEAD_POINTS
    marks = [one.mark for one in judged]
    runs = [len(one.draws) for one in found]
    return Family(
        name=name,
        metric=metric,
        baseline=baseline,
        is_ratio=is_ratio,
        n_places=len(found),
        n_runs=(min(runs), max(runs)),
        over_baseline=overall([one.over_baseline for one in found], is_ratio=is_ratio),
        over_peer=overall([one.over_peer for one in judged], is_ratio=is_ratio) if judged else None,
        marks={mark: marks.count(mark) for mark in ("won", "level", "lost")},
        n_beside_peer=len(judged),
        n_ahead=sum(median >= ahead for median in medians),
        worst=judged[int(np.argmin(medians))] if judged else None,
    )


def _shared(
    by_policy: Mapping[str, Mapping[Draw, float]], ours: str, baseline: str
) -> tuple[Draw, ...]:
    """In an order that does not hang on which run was done first."""
    return tuple(sorted(set(by_policy.get(ours, {})) & set(by_policy.get(baseline, {}))))


def _complete(
    by_policy: Mapping[str, Mapping[Draw, float]], draws: Sequence[Draw]
) -> dict[str, dict[Draw, float]]:
    """Policies that were run in all of these draws, and their values in them, in this order."""
    return {
        name: {draw: values[draw] for draw in draws}
        for name, values in by_policy.items()
        if all(draw in values for draw in draws)
    }


def _median(values: Mapping[Draw, float]) -> float:
    return float(np.median(list(values.values())))
