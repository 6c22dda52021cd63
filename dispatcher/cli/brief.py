"""Verdicts as Markdown: a row a place, then what families come to, then every policy beside the baseline."""

from collections.abc import Callable, Sequence

import numpy as np

from dispatcher.cli.tables import beside, figure, is_share, said
from scheduler.sim import contrast, verdict
from scheduler.sim.verdict import Family, Verdict

At = Callable[[str, float], str]
"How a place of a cell is called."


FAMILY = (
    *("family", "figure", "places", "runs", "beside", "it", "beside the best other"),
    *("won / level / lost", "ahead of it", "worst place"),
)


def places(found: Sequence[Verdict], ours: str, n_runs: Callable[[str], int], at: At) -> str:
    """A table for each figure and baseline; `n_runs` of a cell is how many were to be run."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for one in found:
        groups.setdefault((one.cell.figures.metric, one.cell.baseline), []).append(one)
    return "\n".join(_places(members, ours, n_runs, at) for members in groups.values())


def families(found: Sequence[Family], ours: str, at: At) -> str:
    """A row a family and figure."""
    lines = [
        f"**By family**: geometric means over places of how many times as good `{ours}` is, or mean points more",
        "",
        _row(FAMILY),
        "|---" * len(FAMILY) + "|",
    ]
    lines += [_family(one, at) for one in found]
    return "\n".join(lines) + "\n"


def policies(found: Sequence[Verdict]) -> str:
    """For each figure and baseline a row a policy and a column a family, the best overall first."""
    groups: dict[tuple[str, str], dict[str, list[Verdict]]] = {}
    for one in found:
        group = groups.setdefault((one.cell.figures.metric, one.cell.baseline), {})
        group.setdefault(one.cell.family, []).append(one)
    return "\n".join(
        _policies(metric, baseline, by_family) for (metric, baseline), by_family in groups.items()
    )


def _places(found: Sequence[Verdict], ours: str, n_runs: Callable[[str], int], at: At) -> str:
    figures, baseline = found[0].cell.figures, f"`{found[0].cell.baseline}`"
    metric, mine = figures.metric, f"`{ours}`"
    header = (
        *("cell", "at", "runs", mine, "best other", "it"),
        beside(metric, "it", mine, is_ratio=figures.is_ratio),
        "",
        beside(metric, baseline, mine, is_ratio=figures.is_ratio),
        *("of the way", "of the rest", "bound", "`oracle`"),
    )
    what = f"{metric}, %" if is_share(metric) else metric
    lines = [
        f"**{what}**: {mine}, median [95 %], beside the best of the others there, paired by window and seed",
        "",
        _row(header),
        "|---" * len(header) + "|",
        *(_place(one, n_runs(one.cell.name), at) for one in found),
    ]
    for cell in dict.fromkeys(one.cell.name for one in found):
        absent = _left_out([one for one in found if one.cell.name == cell])
        if absent:
            lines += ["", f"{cell}: run in too few of these draws to take part: {absent}."]
    return "\n".join(lines) + "\n"


def _place(one: Verdict, n_wanted: int, at: At) -> str:
    metric, n = one.cell.figures.metric, len(one.draws)
    words = [
        one.cell.name,
        at(one.cell.name, one.place),
        str(n) if n >= n_wanted else f"{n} of {n_wanted}",
        said(one.ours, metric),
        "" if one.peer is None else f"`{one.peer}`",
        "" if one.peer_value is None else figure(one.peer_value, metric),
        _versus(one.over_peer, one),
        one.mark or "",
        _versus(one.over_baseline, one),
        _way(one.closed_gap),
        _way(one.closed_rest),
        "" if one.bound is None else figure(one.bound, metric),
        "" if one.oracle is None else figure(one.oracle, metric),
    ]
    return _row(words)


def _versus(values: Sequence[float], one: Verdict) -> str:
    if not values:
        return ""
    figures = one.cell.figures
    return said(
        contrast.bootstrap(values),
        "" if figures.is_ratio else figures.metric,
        signed=not figures.is_ratio,
    )


def _way(share: float | None) -> str:
    """Of the way back nothing is told by a share."""
    return f"{share:.0%}" if share is not None and share > 0 else ""


def _left_out(found: Sequence[Verdict]) -> str:
    least: dict[str, int] = {}
    for one in found:
        for name, n in one.left_out.items():
            least[name] = min(n, least.get(name, n))
    return ", ".join(f"`{name}` ({n})" for name, n in least.items())


def _family(one: Family, at: At) -> str:
    metric = "" if one.is_ratio else one.metric
    fewest, most = one.n_runs
    worst = one.worst
    words = [
        one.name,
        one.metric,
        str(one.n_places),
        str(most) if fewest == most else f"{fewest} to {most}",
        f"`{one.baseline}`",
        said(one.over_baseline, metric, signed=not one.is_ratio),
        "" if one.over_peer is None else said(one.over_peer, metric, signed=not one.is_ratio),
        " / ".join(str(n) for n in one.marks.values()),
        f"{one.n_ahead / one.n_beside_peer:.0%}" if one.n_beside_peer else "",
        ""
        if worst is None
        else f"{worst.cell.name} {at(worst.cell.name, worst.place)}: `{worst.peer}` "
        + figure(float(np.median(worst.over_peer)), metric, signed=not one.is_ratio),
    ]
    return _row(words)


def _policies(metric: str, baseline: str, by_family: dict[str, list[Verdict]]) -> str:
    is_ratio = next(iter(by_family.values()))[0].cell.figures.is_ratio
    n_places = {family: len(found) for family, found in by_family.items()}
    found = {family: verdict.over_baseline(members) for family, members in by_family.items()}
    versus = beside(metric, f"`{baseline}`", is_ratio=is_ratio)
    mean = "geometric mean" if is_ratio else "mean"
    lines = [
        f"**{f'{metric}, %' if is_share(metric) else metric}**: {versus}, {mean} over a family's places",
        "",
        _row(["policy", *(f"{family} ({n})" for family, n in n_places.items())]),
        "|---" * (1 + len(found)) + "|",
    ]
    names = dict.fromkeys(name for column in found.values() for name in column)
    rank = {
        name: [column.get(name, (-np.inf, 0))[0] for column in found.values()] for name in names
    }
    for name in sorted(names, key=lambda name: rank[name], reverse=True):
        words = [f"`{name}`"]
        for family, column in found.items():
            value, n = column.get(name, (0.0, 0))
            shown = figure(value, "" if is_ratio else metric, signed=not is_ratio) if n else ""
            words.append(shown if n in (0, n_places[family]) else f"{shown} (of {n})")
        lines.append(_row(words))
    return "\n".join(lines) + "\n"


def _row(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"
