"""One run in figures: the JSON object of a cell and a seed.

Rates are over all arrivals that were measured, but for those whose clients took them away: whether they would have been
in time nobody knows.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from scheduler.sim.fate import Fate
from scheduler.sim.shares import fair
from scheduler.sim.world import Moment, World

GROUPS = 10
"Deciles of prompt length, where no tenants are named."


CURVE_POINTS = 101
WINDOW_S = 60.0
"Of the learning curve."

TIMELINE_MAX = 600
"Points of an endpoint's timeline; longer runs are thinned."


class Curves(msgspec.Struct, frozen=True, kw_only=True):
    """What pictures need beyond figures."""

    ttft_s: tuple[float, ...]
    "Quantiles of time to first token in even steps from 0 to 1."

    ttft_by_minute_s: tuple[float | None, ...]
    "Mean of those that arrived in each minute of the run."

    timeline: tuple[Moment, ...]
    "The first endpoint's load."


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant got."""

    n: int
    on_time: float
    on_time_fair: float
    "What it would be if as many on time in all were shared max-min, by the tenants' shares."
    ttft_mean_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load with one seed. A figure that has no sample is null."""

    policy: str
    load: float | None
    "Multiple of the measured capacity; null where a rate was asked for."
    rate_rps: float
    seed: int
    n: int
    n_completed: int
    n_expired: int
    n_rejected: int
    n_cancelled: int = 0
    "Taken away by their clients before they had ended: in no other figure but `n` and `wasted_tokens`."
    n_failed: int
    n_unfinished: int
    on_time: float
    "Share that kept all of its promises."
    on_time_weighted: float
    ttft_attainment: float
    tpot_attainment: float
    e2e_attainment: float
    ttft_mean_s: float | None
    "Of those that had a first token."
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    tpot_p99_s: float | None
    gap_worst_s: float | None
    "Between tokens: the mean, over requests, of the longest tenth of each one's gaps."
    gap_max_p50_s: float | None
    "Of the longest gap of each request."
    gap_max_p99_s: float | None
    token_attainment: float
    "Share in which every token came by its own due moment; what the first token came early is credit for the next."
    goodput_rps: float
    "On time a second of arrivals."
    decode_tokens_per_s: float
    "Output tokens of the completed a second, from the first arrival to the last end."
    cache_hit: float
    "Share of the completed prompts' tokens found in a prefix cache."
    preemptions: int
    aborts: int
    wasted_tokens: int
    "Computed for nobody: before preemptions, aborts and deaths."
    fairness_jain: float
    "Jain's index of the share on time, over tenants, else over deciles of prompt length."
    max_wait_s: float
    "The longest anybody waited for a first token, those included who never had one."
    decide_us_p50: float | None
    decide_us_p99: float | None
    wall_s: float
    cache_best: float | None = None
    "Share of the same tokens that the fullest cache for them held when they were assigned; null in older files, as the next."
    cache_believed: float | None = None
    "Share that was believed to be where they went."
    cache_error: float | None = None
    "Mean, over the completed, of how far that was from what was found there, as a share of the prompt."
    on_time_by_decile: tuple[float, ...]
    "From the shortest prompts to the longest."
    by_tenant: dict[str, Tenant] = {}
    "Empty where no tenant is named."
    ttft_mean_bound_s: float | None = None
    "No policy can have a smaller mean."
    on_time_bound: float | None = None
    "No policy can have more on time; null unless all are promised the same TTFT and nothing else."
    capacity_rps: float | None = None
    keeps: float | None = None
    "The share on time that the cell's baseline was to keep at this load; null where loads are given."
    fleet: str = ""
    trace: str = ""
    window: str = ""
    "Which part of the trace, where several are run."
    curves: Curves | None = None


def of(
    world: World,
    *,
    policy: str,
    load: float | None,
    rate_rps: float,
    seed: int,
    wall_s: float,
    cut: float = 0.0,
    shares: Mapping[str, float] | None = None,
) -> Report:
    """The figures of a run that is over.

    Args:
        world: the run.
        policy: what it ran under.
        load: multiple of the capacity, if the rate was made from one.
        rate_rps: arrivals a second.
        seed: whose machines.
        wall_s: our own time.
        cut: the share of first arrivals that is left out.
        shares: the tenants' weights; 1 for who is not named.
    """
    measured = world.fates[int(cut * len(world.fates)) :]
    fates = [fate for fate in measured if fate.end != "cancelled"]
    on_time = np.array([fate.is_on_time for fate in fates], dtype=np.float64)
    weights = np.array([fate.weight for fate in fates])
    ttft = np.array([fate.ttft_s for fate in fates if fate.ttft_s is not None])
    tpot = np.array([fate.tpot_s for fate in fates if fate.tpot_s is not None])
    gap_max = np.array([fate.gap_max_s for fate in fates if fate.gap_max_s is not None])
    ends = [fate.end for fate in fates]
    completed = [fate for fate in fates if fate.end == "completed"]
    prompts = sum(fate.arrival.prompt_tokens for fate in completed)
    first_s = fates[0].enqueued_at if fates else 0.0
    last_s = max((fate.finished_at or 0.0 for fate in completed), default=first_s)
    span_s = len(measured) / rate_rps
    engines = [endpoint.engine for endpoint in world.endpoints.values()]
    return Report(
        policy=policy,
        load=load,
        rate_rps=rate_rps,
        seed=seed,
        n=len(measured),
        n_completed=len(completed),
        n_expired=ends.count("expired"),
        n_rejected=ends.count("rejected"),
        n_cancelled=len(measured) - len(fates),
        n_failed=ends.count("failed"),
        n_unfinished=ends.count("unfinished"),
        on_time=_mean(on_time),
        on_time_weighted=float((on_time * weights).sum() / weights.sum()) if fates else 0.0,
        ttft_attainment=_mean(np.array([fate.keeps_ttft for fate in fates], dtype=np.float64)),
        tpot_attainment=_mean(np.array([fate.keeps_tpot for fate in fates], dtype=np.float64)),
        e2e_attainment=_mean(np.array([fate.keeps_e2e for fate in fates], dtype=np.float64)),
        ttft_mean_s=float(ttft.mean()) if len(ttft) else None,
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p90_s=_quantile(ttft, 0.9),
        ttft_p99_s=_quantile(ttft, 0.99),
        tpot_mean_s=float(tpot.mean()) if len(tpot) else None,
        tpot_p99_s=_quantile(tpot, 0.99),
        gap_worst_s=_mean_known([fate.gap_worst_s for fate in fates]),
        gap_max_p50_s=_quantile(gap_max, 0.5),
        gap_max_p99_s=_quantile(gap_max, 0.99),
        token_attainment=_mean(np.array([fate.keeps_tokens for fate in fates], dtype=np.float64)),
        goodput_rps=float(on_time.sum()) / span_s if span_s else 0.0,
        decode_tokens_per_s=sum(fate.output_tokens for fate in completed)
        / max(1e-9, last_s - first_s),
        cache_hit=sum(fate.cached_tokens for fate in completed) / prompts if prompts else 0.0,
        cache_best=sum(fate.best_tokens for fate in completed) / max(1, prompts),
        cache_believed=sum(fate.believed_tokens for fate in completed) / max(1, prompts),
        cache_error=_mean(np.array([_cache_error(fate) for fate in completed])),
        preemptions=sum(engine.counters.preemptions for engine in engines),
        aborts=world.aborts,
        wasted_tokens=sum(fate.wasted_tokens for fate in measured),
        fairness_jain=jain(_groups(fates)),
        max_wait_s=max((_waited_s(fate, world.now) for fate in fates), default=0.0),
        decide_us_p50=_quantile(np.array(world.decide_ns) / 1e3, 0.5),
        decide_us_p99=_quantile(np.array(world.decide_ns) / 1e3, 0.99),
        wall_s=wall_s,
        on_time_by_decile=tuple(_by_decile(fates)),
        by_tenant=_by_tenant(fates, shares or {}),
    )


def curves(world: World) -> Curves:
    """What pictures need of a run that is over."""
    ttft = [(fate.enqueued_at, fate.ttft_s) for fate in world.fates if fate.ttft_s is not None]
    minutes: dict[int, list[float]] = {}
    for at, seconds in ttft:
        minutes.setdefault(int(at // WINDOW_S), []).append(seconds)
    values = np.array([seconds for _, seconds in ttft])
    steps = np.linspace(0.0, 1.0, CURVE_POINTS)
    thin = max(1, len(world.timeline) // TIMELINE_MAX)
    return Curves(
        ttft_s=tuple(np.quantile(values, steps).tolist()) if len(values) else (),
        ttft_by_minute_s=tuple(
            float(np.mean(minutes[at])) if at in minutes else None
            for at in range(max(minutes, default=-1) + 1)
        ),
        timeline=tuple(world.timeline[::thin]),
    )


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all; 1 where nobody has anything.

    >>> jain([1.0, 0.0])
    0.5
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def _groups(fates: Sequence[Fate]) -> list[float]:
    kept: dict[str, list[bool]] = {}
    for fate in fates:
        kept.setdefault(fate.arrival.tenant, []).append(fate.is_on_time)
    if len(kept) < 2:
        return _by_decile(fates)
    return [float(np.mean(one)) for _, one in sorted(kept.items())]


def _by_tenant(fates: Sequence[Fate], shares: Mapping[str, float]) -> dict[str, Tenant]:
    groups: dict[str, list[Fate]] = {}
    for fate in fates:
        groups.setdefault(fate.arrival.tenant, []).append(fate)
    total = sum(fate.is_on_time for fate in fates)
    fairly = fair({name: len(group) for name, group in groups.items()}, total, shares)
    return {
        name: Tenant(
            n=len(group),
            on_time=float(np.mean([fate.is_on_time for fate in group])),
            on_time_fair=fairly[name] / len(group),
            ttft_mean_s=_mean_known([fate.ttft_s for fate in group]),
            ttft_p99_s=_quantile(np.array([f.ttft_s for f in group if f.ttft_s is not None]), 0.99),
            tpot_mean_s=_mean_known([fate.tpot_s for fate in group]),
        )
        for name, group in sorted(groups.items())
        if name
    }


def _by_decile(fates: Sequence[Fate]) -> list[float]:
    by_length = sorted(fates, key=lambda fate: (fate.arrival.prompt_tokens, fate.row))
    parts = np.array_split(np.array([fate.is_on_time for fate in by_length]), GROUPS)
    return [float(part.mean()) for part in parts if len(part)]


def _cache_error(fate: Fate) -> float:
    return abs(fate.believed_tokens - fate.cached_tokens) / fate.arrival.prompt_tokens


def _waited_s(fate: Fate, now: float) -> float:
    if fate.ttft_s is not None:
        return fate.ttft_s
    return (
        max(0.0, (fate.finished_at or now) - fate.enqueued_at) if fate.end == "unfinished" else 0.0
    )


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _quantile(values: np.ndarray[tuple[int], np.dtype[np.float64]], q: float) -> float | None:
    return float(np.quantile(values, q)) if len(values) else None
