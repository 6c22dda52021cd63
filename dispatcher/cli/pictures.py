"""Pictures of an evaluation, and one page that holds them all. The only file that knows matplotlib."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scheduler.errors import SettingsError
from scheduler.sim.contrast import Contrast
from scheduler.sim.report import Report

try:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
except ImportError as error:
    raise SettingsError(
        "pictures need matplotlib, wanted: pip install 'headgate[plots]'"
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 8.0, 4.5, 120


def write(
    folder: Path, reports: Sequence[Report], tables: Mapping[str, Sequence[Contrast]], base: str
) -> None:
    """One PNG a picture and `index.html` with all of them inside."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {key: _by_load(key, rows) for key, rows in tables.items()}
    with_curves = [one for one in reports if one.curves is not None and one.seed == 0]
    if with_curves:
        last = max(_place(one) for one in with_curves)
        shown = [one for one in with_curves if _place(one) == last]
        pictures["ttft_cdf"] = _cdf(shown)
        pictures["learning"] = _learning(shown)
        pictures["timeline"] = _timeline(shown[0])
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        plt.close(figure)
    page = _page(folder, list(pictures), tables, base)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _place(one: Report) -> float:
    return one.rate_rps if one.load is None else one.load


def _axes(title: str, x: str, y: str) -> "tuple[Figure, Axes]":
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _by_load(key: str, rows: Sequence[Contrast]) -> "Figure":
    figure, axes = _axes(f"{key} (median, 95 % interval)", "load", key)
    for policy in dict.fromkeys(row.policy for row in rows):
        own = sorted((row for row in rows if row.policy == policy), key=lambda row: row.place)
        places = [row.place for row in own]
        middle = np.array([row.value.median for row in own])
        errors = [
            middle - np.array([row.value.low for row in own]),
            np.array([row.value.high for row in own]) - middle,
        ]
        axes.errorbar(
            places, middle, yerr=np.maximum(errors, 0.0), label=policy, capsize=2, marker="o", ms=3
        )
    if key.endswith("_s"):
        axes.set_yscale("log")
    axes.legend(fontsize="x-small", ncols=2)
    return figure


def _cdf(shown: Sequence[Report]) -> "Figure":
    figure, axes = _axes("time to first token", "seconds", "share of requests")
    for one in shown:
        assert one.curves is not None
        quantiles = one.curves.ttft_s
        axes.plot(quantiles, np.linspace(0.0, 1.0, len(quantiles)), label=one.policy)
    axes.set_xscale("log")
    axes.legend(fontsize="x-small", ncols=2)
    return figure


def _learning(shown: Sequence[Report]) -> "Figure":
    figure, axes = _axes("mean time to first token, minute by minute", "minutes", "seconds")
    for one in shown:
        assert one.curves is not None
        values = [np.nan if v is None else v for v in one.curves.ttft_by_minute_s]
        axes.plot(range(len(values)), values, label=one.policy)
    axes.set_yscale("log")
    axes.legend(fontsize="x-small", ncols=2)
    return figure


def _timeline(one: Report) -> "Figure":
    assert one.curves is not None
    figure, axes = _axes(f"the first endpoint under {one.policy}", "seconds", "requests")
    moments = np.array(one.curves.timeline).reshape(-1, 5)
    for column, label in ((1, "running"), (2, "waiting in the engine"), (3, "held by the worker")):
        axes.plot(moments[:, 0], moments[:, column], label=label, lw=1)
    other = axes.twinx()
    other.plot(moments[:, 0], moments[:, 4], color="grey", lw=0.8, label="KV usage (right)")
    other.set_ylim(0.0, 1.05)
    other.set_ylabel("part of the KV cache")
    figure.legend(
        fontsize="x-small", loc="upper left", bbox_to_anchor=(0, 1), bbox_transform=axes.transAxes
    )
    return figure


def _page(
    folder: Path, names: Sequence[str], tables: Mapping[str, Sequence[Contrast]], base: str
) -> str:
    """HTML that needs nothing beside itself."""
    style = (
        "body{font:14px sans-serif;max-width:1000px;margin:2em auto}"
        "td,th{padding:2px 10px;text-align:left}img{max-width:100%}"
    )
    how = "Medians with 95 % bootstrap intervals, paired by seed."
    parts = [
        "<!doctype html><meta charset='utf-8'><title>headgate compare</title>",
        f"<style>{style}</style>",
        f"<h1>headgate compare</h1><p>Baseline: {html.escape(base)}. {how}</p>",
    ]
    for name in names:
        image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(name)}</h2><img alt='{html.escape(name)}' src='data:image/png;base64,{image}'>"
        )
        parts.append(_rows(tables[name]) if name in tables else "")
    return "\n".join(parts) + "\n"


def _rows(rows: Sequence[Contrast]) -> str:
    lines = [
        "<table><tr><th>policy<th>at<th>median<th>low<th>high<th>vs baseline<th>low<th>high</tr>"
    ]
    for row in rows:
        versus: tuple[str, ...] = ("-",) * 3
        if row.versus is not None:
            versus = tuple(f"{v:.3f}" for v in (row.versus.median, row.versus.low, row.versus.high))
        own = (f"{v:.3f}" for v in (row.value.median, row.value.low, row.value.high))
        cells = (html.escape(row.policy), f"{row.place:g}", *own, *versus)
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
