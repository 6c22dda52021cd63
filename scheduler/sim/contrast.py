"""Policies beside each other: medians, bootstrap intervals and differences paired by window and seed."""

from collections.abc import Sequence

import msgspec
import numpy as np

from scheduler.sim.report import Report

Draw = tuple[str, int]
"Window and seed: what two policies must share to be compared."

RESAMPLES = 2000
BOOTSTRAP_SEED = 20_250_101

WON_RATIO, WON_POINTS = 0.03, 0.01
"How far apart two policies must be, beside being sure of it."

LESS_IS_BETTER = ("_s", "wasted_tokens", "preemptions", "aborts")


class Estimate(msgspec.Struct, frozen=True):
    """A median and the interval that 95 % of resampled medians fall into."""

    median: float
    low: float
    high: float


class Contrast(msgspec.Struct, frozen=True, kw_only=True):
    """One policy in one cell, and how it stands to the baseline in the same windows with the same seeds."""

    policy: str
    place: float
    "The load, or the rate where loads were not used."
    n_runs: int
    "Windows times seeds."
    value: Estimate
    versus: Estimate | None
    "Baseline over ours where less is better, ours less the baseline otherwise; None for the baseline itself."
    is_ratio: bool
    closed_gap: float | None
    "How much of the way from the baseline to the bound is gone; None without a bound."


def bootstrap(values: Sequence[float]) -> Estimate:
    """The median of few values with its percentile interval; the same values give the same interval.

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(median=1.0, low=1.0, high=1.0)
    """
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.integers(len(sample), size=(RESAMPLES, len(sample)))
    medians = np.median(sample[drawn], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Estimate(float(np.median(sample)), float(low), float(high))


def contrasts(reports: Sequence[Report], *, metric: str, baseline: str) -> list[Contrast]:
    """Every policy and place, in the order in which they first come.

    Raises:
        KeyError: the baseline was not run.
    """
    values: dict[tuple[str, float], dict[Draw, float]] = {}
    bounds: dict[tuple[float, Draw], float | None] = {}
    for one in reports:
        found = getattr(one, metric)
        place = one.rate_rps if one.load is None else one.load
        draw = (one.window, one.seed)
        bounds[place, draw] = _bound(one, metric)
        if found is not None:
            values.setdefault((one.policy, place), {})[draw] = float(found)
    if not any(policy == baseline for policy, _ in values):
        raise KeyError(baseline)
    is_ratio = metric.endswith(LESS_IS_BETTER) and not metric.endswith("_per_s")
    found_all = []
    for (policy, place), ours in values.items():
        base = values.get((baseline, place), {})
        shared = [draw for draw in ours if draw in base]
        versus = None
        if policy != baseline and shared:
            versus = bootstrap([_versus(ours[d], base[d], is_ratio=is_ratio) for d in shared])
        gaps = [
            (ours[d] - base[d]) / (bound - base[d])
            for d in shared
            if (bound := bounds[place, d]) is not None and abs(bound - base[d]) > 1e-9
        ]
        found_all.append(
            Contrast(
                policy=policy,
                place=place,
                n_runs=len(ours),
                value=bootstrap(list(ours.values())),
                versus=versus,
                is_ratio=is_ratio,
                closed_gap=float(np.median(gaps)) if gaps and policy != baseline else None,
            )
        )
    return found_all


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
        for other in dict.fromkeys(one.policy for one in reports if one.policy != ours):
            for row in contrasts(reports, metric=metric, baseline=other):
                if row.policy == ours and row.versus is not None:
                    found.setdefault((row.is_ratio, other), []).append(row.versus)
    return [
        _standing(other, found[is_ratio, other], is_ratio=is_ratio)
        for is_ratio, other in sorted(found, key=lambda key: not key[0])
    ]


def _standing(other: str, versus: Sequence[Estimate], *, is_ratio: bool) -> Standing:
    even, enough = (1.0, WON_RATIO) if is_ratio else (0.0, WON_POINTS)
    medians = np.array([one.median for one in versus])
    return Standing(
        other=other,
        is_ratio=is_ratio,
        overall=float(np.exp(np.log(medians).mean())) if is_ratio else float(medians.mean()),
        n_won=sum(one.low > even and one.median >= even + enough for one in versus),
        n_lost=sum(one.high < even and one.median <= even - enough for one in versus),
        n_places=len(versus),
    )


def _versus(ours: float, theirs: float, *, is_ratio: bool) -> float:
    if not is_ratio:
        return ours - theirs
    return theirs / ours if ours > 0 else 1.0


def _bound(one: Report, metric: str) -> float | None:
    if metric == "ttft_mean_s":
        return one.ttft_mean_bound_s
    return one.on_time_bound if metric in ("on_time", "ttft_attainment") else None
