"""Contrasts as a Markdown table: a row a policy, the best at the highest load first; a column a load."""

from collections.abc import Mapping, Sequence

from scheduler.sim.contrast import Contrast, Estimate


def markdown(
    metric: str,
    rows: Sequence[Contrast],
    baseline: str,
    bounds: Mapping[float, float] | None = None,
) -> str:
    """One figure's table; `bounds` by place: what nobody can beat, as a last row."""
    places = sorted({row.place for row in rows})
    found = {(row.policy, row.place): row for row in rows}
    versus = f"`{baseline}` / it" if rows and rows[0].is_ratio else f"less `{baseline}`"
    header = ["policy", *(word for place in places for word in (f"at {place:g}", versus))]
    lines = [
        f"**{metric}{', %' if _is_share(metric) else ''}**, median of {_runs(rows)} [95 %]",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    for policy in _ranked(rows, places):
        words = [f"`{policy}`"]
        for place in places:
            row = found.get((policy, place))
            words += ["", ""] if row is None else [_said(row.value, metric), _beside(row, metric)]
        lines.append("| " + " | ".join(words) + " |")
    if bounds:
        words = ["bound"]
        for place in places:
            words += [_figure(bounds[place], metric) if place in bounds else "", ""]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def _ranked(rows: Sequence[Contrast], places: Sequence[float]) -> list[str]:
    """Policies by their figure where load is highest; those that were not run there come last."""
    is_ratio = bool(rows) and rows[0].is_ratio
    sign = 1.0 if is_ratio else -1.0
    best: dict[str, float] = {row.policy: float("inf") for row in rows}
    best |= {row.policy: sign * row.value.median for row in rows if row.place == places[-1]}
    return sorted(best, key=lambda policy: best[policy])


def _runs(rows: Sequence[Contrast]) -> str:
    counts = sorted({row.n_runs for row in rows}) or [0]
    if counts == [1]:
        return "1 run"
    return f"{counts[0]} runs" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"


def _beside(row: Contrast, metric: str) -> str:
    """How it stands to the baseline, and how much of the way to the bound that is."""
    if row.versus is None:
        return ""
    shown = _said(row.versus, "" if row.is_ratio else metric, signed=not row.is_ratio)
    if row.closed_gap is None or row.closed_gap <= 0:  # of the way back nothing is told by a share
        return shown
    return f"{shown}, {row.closed_gap:.0%} of the way"


def _said(found: Estimate, metric: str, *, signed: bool = False) -> str:
    middle, low, high = (
        _figure(value, metric, signed=signed) for value in (found.median, found.low, found.high)
    )
    return middle if low == high else f"{middle} [{low}, {high}]"


def _figure(value: float, metric: str, *, signed: bool = False) -> str:
    """Three digits, or one behind the point of a percentage."""
    if _is_share(metric):
        return f"{100 * value:{'+' if signed else ''}.1f}"
    digits = sum(abs(value) < step for step in (1, 10, 100))
    return f"{value:{'+' if signed else ''}.{digits}f}"


def _is_share(metric: str) -> bool:
    return metric.startswith("on_time") or metric.endswith("attainment") or metric == "cache_hit"
