"""Policies beside each other: medians, bootstrap intervals and differences paired by window and seed."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from scheduler.sim.report import Report
from scheduler.state import Floats

Draw = tuple[str, int]
"Window and seed: what two policies must share to be compared."

Mark = Literal["won", "level", "lost"]

RESAMPLES = 2000
BOOTSTRAP_SEED = 20_250_101

WON_RATIO, WON_POINTS = 0.03, 0.01
"How far apart two policies must be, beside being sure of it."

LESS_IS_BETTER = ("_s", "wasted_tokens", "preemptions", "aborts")
RATES = ("_per_s", "_rps")
"Figures of which more is better, and compared by quotients as well."


class Estimate(msgspec.Struct, frozen=True):
    """A median and the interval that 95 % of resampled medians fall into."""

    median: float
    low: float
    high: float


class Contrast(msgspec.Struct, frozen=True, kw_only=True):
    """One policy in one cell, and how it stands to the baseline in the same windows with the same seeds."""

    policy: str
    place: float
    "What `place` says of its runs."
    n_runs: int
    "Windows times seeds."
    value: Estimate
    versus: Estimate | None
    "As `Figures.paired` has it; None for the baseline itself."
    is_ratio: bool
    closed_gap: float | None
    "How much of the way from the baseline to the bound is gone; None without a bound."


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one cell's runs, sorted by where and who."""

    metric: str
    values: dict[float, dict[str, dict[Draw, float]]]
    "By place, policy and draw; runs without the figure are not in it."
    bounds: dict[float, dict[Draw, float]]
    "What no policy can beat in that draw, where it is known."

    @property
    def is_ratio(self) -> bool:
        """Whether policies are compared by quotients, as seconds and rates are, or by differences, as shares are."""
        return self.metric.endswith((*LESS_IS_BETTER, *RATES))

    @property
    def less_is_better(self) -> bool:
        return less_is_better(self.metric)

    def paired(self, ours: Mapping[Draw, float], theirs: Mapping[Draw, float]) -> list[float]:
        """How many times as good ours is in each draw that both ran, or by how much: better above 1, or above 0."""
        both = [(ours[draw], theirs[draw]) for draw in ours if draw in theirs]
        if not self.is_ratio:
            return [one - other for one, other in both]
        if self.less_is_better:
            both = [(other, one) for one, other in both]
        return [over / under if under > 0 else 1.0 for over, under in both]


def less_is_better(metric: str) -> bool:
    return metric.endswith(LESS_IS_BETTER) and not metric.endswith(RATES)


def place(report: Report) -> float:
    """Where in its cell: the share that the baseline is to keep, else the load, else the rate."""
    if report.keeps is not None:
        return report.keeps
    return report.rate_rps if report.load is None else report.load


def figures(reports: Sequence[Report], metric: str) -> Figures:
    """One figure of all runs, places and policies in the order in which they first come."""
    values: dict[float, dict[str, dict[Draw, float]]] = {}
    bounds: dict[float, dict[Draw, float]] = {}
    for one in reports:
        found, bound = getattr(one, metric), _bound(one, metric)
        draw = (one.window, one.seed)
        if bound is not None:
            bounds.setdefault(place(one), {})[draw] = bound
        if found is not None:
            values.setdefault(place(one), {}).setdefault(one.policy, {})[draw] = float(found)
    return Figures(metric=metric, values=values, bounds=bounds)


def resampled(values: Sequence[float]) -> Floats:
    """float64[RESAMPLES], medians of few values drawn with replacement.

    As many values are always drawn at the same places of the sequence: of two places with the same draws in the same
    order, resample by resample, the same draws are meant.
    """
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.integers(len(sample), size=(RESAMPLES, len(sample)))
    medians: Floats = np.median(sample[drawn], axis=1)
    return medians


def estimate(middle: float, drawn: Floats) -> Estimate:
    """A figure with the interval that 95 % of its resamples fall into."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(middle, float(low), float(high))


def bootstrap(values: Sequence[float]) -> Estimate:
    """The median of few values with its percentile interval; the same values give the same interval.

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(median=1.0, low=1.0, high=1.0)
    """
    return estimate(float(np.median(values)), resampled(values))


def closed_gap(
    ours: Mapping[Draw, float], theirs: Mapping[Draw, float], bounds: Mapping[Draw, float]
) -> float | None:
    """How much of the way from theirs to the bound is gone, the median over draws; None where nothing is known."""
    gaps = [
        (ours[draw] - theirs[draw]) / (bounds[draw] - theirs[draw])
        for draw in ours
        if draw in theirs and draw in bounds and abs(bounds[draw] - theirs[draw]) > 1e-9
    ]
    return float(np.median(gaps)) if gaps else None


def contrasts(reports: Sequence[Report], *, metric: str, baseline: str) -> list[Contrast]:
    """Every policy and place, in the order in which they first come.

    Raises:
        KeyError: the baseline was not run.
    """
    found = figures(reports, metric)
    if not any(baseline in by_policy for by_policy in found.values.values()):
        raise KeyError(baseline)
    return [
        _contrast(found, at, policy, baseline)
        for policy, at in dict.fromkeys((one.policy, place(one)) for one in reports)
        if policy in found.values.get(at, {})
    ]


def _contrast(found: Figures, at: float, policy: str, baseline: str) -> Contrast:
    ours, base = found.values[at][policy], found.values[at].get(baseline, {})
    versus = found.paired(ours, base) if policy != baseline else []
    return Contrast(
        policy=policy,
        place=at,
        n_runs=len(ours),
        value=bootstrap(list(ours.values())),
        versus=bootstrap(versus) if versus else None,
        is_ratio=found.is_ratio,
        closed_gap=closed_gap(ours, base, found.bounds.get(at, {})) if policy != baseline else None,
    )


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One policy against another over all places of all cells where both ran."""

    other: str
    is_ratio: bool
    overall: float
    "The geometric mean of ratios, or the mean of differences: above 1 or 0 is better."
    n_won: int
    n_lost: int
    n_places: int
    "Won, lost and neither."


def standings(cells: Sequence[tuple[str, Sequence[Report]]], *, ours: str) -> list[Standing]:
    """How `ours` stands to every other policy, ratios first; each cell by the metric that comes with it.

    A place (a cell at a load) is won where the interval leaves out "no difference" and the median is at least
    `WON_RATIO` or `WON_POINTS` away from it.
    """
    found: dict[tuple[bool, str], list[Estimate]] = {}
    for metric, reports in cells:
        cell = figures(reports, metric)
        for other in dict.fromkeys(one.policy for one in reports if one.policy != ours):
            for by_policy in cell.values.values():
                versus = cell.paired(by_policy.get(ours, {}), by_policy.get(other, {}))
                if versus:
                    found.setdefault((cell.is_ratio, other), []).append(bootstrap(versus))
    return [
        _standing(other, found[is_ratio, other], is_ratio=is_ratio)
        for is_ratio, other in sorted(found, key=lambda key: not key[0])
    ]


def overall(medians: Sequence[float], *, is_ratio: bool) -> float:
    """Over places: the geometric mean of ratios, or the mean of differences."""
    found = np.array(medians)
    return float(np.exp(np.log(found).mean())) if is_ratio else float(found.mean())


def mark(versus: Estimate, *, is_ratio: bool) -> Mark:
    """Whether a place is won: surely, and by enough to matter."""
    even, enough = (1.0, WON_RATIO) if is_ratio else (0.0, WON_POINTS)
    if versus.low > even and versus.median >= even + enough:
        return "won"
    if versus.high < even and versus.median <= even - enough:
        return "lost"
    return "level"


def _standing(other: str, versus: Sequence[Estimate], *, is_ratio: bool) -> Standing:
    marks = [mark(one, is_ratio=is_ratio) for one in versus]
    return Standing(
        other=other,
        is_ratio=is_ratio,
        overall=overall([one.median for one in versus], is_ratio=is_ratio),
        n_won=marks.count("won"),
        n_lost=marks.count("lost"),
        n_places=len(versus),
    )


def _bound(one: Report, metric: str) -> float | None:
    if metric == "ttft_mean_s":
        return one.ttft_mean_bound_s
    return one.on_time_bound if metric in ("on_time", "ttft_attainment") else None
