"""Contrasts as a Markdown table: a row a policy, the best at the highest load first; a column a load."""

from collections.abc import Callable, Mapping, Sequence

from scheduler.sim.contrast import Contrast, Draw, Estimate, Figures, less_is_better
from scheduler.sim.verdict import TAIL_RUNS, is_tail


def markdown(
    metric: str,
    rows: Sequence[Contrast],
    baseline: str,
    bounds: Mapping[float, float] | None = None,
    *,
    at: Callable[[float], str] = "at {:g}".format,
    n_wanted: int = 0,
) -> str:
    """One figure's table.

    Args:
        metric: the figure.
        rows: each policy at each place.
        baseline: whom they stand beside.
        bounds: by place: what nobody can beat, as a last row.
        at: how a place is called.
        n_wanted: how many runs there were to be; fewer are told.
    """
    places = sorted({row.place for row in rows})
    found = {(row.policy, row.place): row for row in rows}
    versus = beside(metric, f"`{baseline}`", is_ratio=bool(rows) and rows[0].is_ratio)
    header = ["policy", *(word for place in places for word in (at(place), versus))]
    lines = [
        f"**{metric}{', %' if is_share(metric) else ''}**, median of {_runs(rows, n_wanted)} [95 %]",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    for policy in _ranked(rows, places, metric):
        words = [f"`{policy}`"]
        for place in places:
            row = found.get((policy, place))
            words += ["", ""] if row is None else [said(row.value, metric), _beside(row, metric)]
        lines.append("| " + " | ".join(words) + " |")
    if bounds:
        words = ["bound"]
        for place in places:
            words += [figure(bounds[place], metric) if place in bounds else "", ""]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def bounded(
    found: Figures,
    closer: Mapping[float, Mapping[Draw, float]],
    ours: str,
    *,
    at: Callable[[float], str],
) -> str:
    """A row a place and draw: the pooled server's bound, a closer one, ours and the best of the others there.

    Args:
        found: a share, of every policy.
        closer: by place and draw.
        ours: the policy that is shown whether it is the best or not.
        at: how a place is called.
    """
    lines = [
        f"| {found.metric}, % | window | seed | pooled server | one endpoint each | `{ours}` | best other | |",
        "|---" * 8 + "|",
    ]
    for place, draws in sorted(closer.items()):
        for (window, seed), bound in draws.items():
            shares = {
                policy: by_draw[window, seed]
                for policy, by_draw in found.values[place].items()
                if (window, seed) in by_draw
            }
            us = shares.pop(ours, None)
            best = max(shares, key=lambda policy: shares[policy], default=None)
            figures = [
                found.bounds[place][window, seed],
                bound,
                us,
                None if best is None else shares[best],
            ]
            said = ["" if one is None else figure(one, found.metric) for one in figures]
            words = [at(place), window, str(seed), *said, "" if best is None else f"`{best}`"]
            lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def _ranked(rows: Sequence[Contrast], places: Sequence[float], metric: str) -> list[str]:
    """Policies by their figure where load is highest; those that were not run there come last."""
    sign = 1.0 if less_is_better(metric) else -1.0
    best: dict[str, float] = {row.policy: float("inf") for row in rows}
    best |= {row.policy: sign * row.value.median for row in rows if row.place == places[-1]}
    return sorted(best, key=lambda policy: best[policy])


def _runs(rows: Sequence[Contrast], n_wanted: int) -> str:
    counts = sorted({row.n_runs for row in rows}) or [0]
    if counts == [1]:
        return "1 run" if n_wanted <= 1 else f"1 of {n_wanted} runs"
    counted = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{counted} runs" if counts[0] >= n_wanted else f"{counted} of {n_wanted} runs"


def _beside(row: Contrast, metric: str) -> str:
    """How it stands to the baseline, and how much of the way to the bound that is."""
    if row.versus is None or (is_tail(metric) and row.n_runs < TAIL_RUNS):
        return ""
    shown = said(row.versus, "" if row.is_ratio else metric, signed=not row.is_ratio)
    if row.closed_gap is None or row.closed_gap <= 0:  # of the way back nothing is told by a share
        return shown
    return f"{shown}, {row.closed_gap:.0%} of the way"


def beside(metric: str, other: str, it: str = "it", *, is_ratio: bool) -> str:
    """What a column compares, so that more is better."""
    if not is_ratio:
        return f"less {other}"
    return f"{other} / {it}" if less_is_better(metric) else f"{it} / {other}"


def said(found: Estimate, metric: str, *, signed: bool = False) -> str:
    middle, low, high = (
        figure(value, metric, signed=signed) for value in (found.median, found.low, found.high)
    )
    return middle if low == high else f"{middle} [{low}, {high}]"


def figure(value: float, metric: str, *, signed: bool = False) -> str:
    """A figure with three digits, or one behind the point of a percentage."""
    if is_share(metric):
        return f"{100 * value:{'+' if signed else ''}.1f}"
    digits = sum(abs(value) < step for step in (1, 10, 100))
    return f"{value:{'+' if signed else ''}.{digits}f}"


def is_share(metric: str) -> bool:
    return metric.startswith("on_time") or metric.endswith("attainment") or metric == "cache_hit"
