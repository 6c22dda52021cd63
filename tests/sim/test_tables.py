"""Results as Markdown tables: what comes first, in which units, and what is left out."""

from dispatcher.cli import tables
from scheduler.sim.contrast import Contrast, Estimate


def row(policy, place, median, *, versus=None, is_ratio=False, closed_gap=None, spread=0.0):
    return Contrast(
        policy=policy,
        place=place,
        n_runs=3,
        value=Estimate(median, median - spread, median + spread),
        versus=None if versus is None else Estimate(versus, versus, versus),
        is_ratio=is_ratio,
        closed_gap=closed_gap,
    )


def lines(*given):
    return tables.markdown(*given).splitlines()


class TestMarkdown:
    def test_the_best_at_the_highest_load_comes_first(self):
        """More is better of shares, less of seconds; who was not run there comes last."""
        shares = [row("low", 0.7, 0.99), row("low", 0.9, 0.5), row("high", 0.9, 0.8)]
        seconds = [row("slow", 0.9, 2.0, is_ratio=True), row("fast", 0.9, 1.0, is_ratio=True)]
        absent = row("absent", 0.7, 0.1, is_ratio=True)

        found = lines("on_time", shares, "low")
        assert [line.split(" | ")[0] for line in found[4:]] == ["| `high`", "| `low`"]
        found = lines("ttft_mean_s", [absent, *seconds], "slow")
        assert [line.split(" | ")[0] for line in found[4:]] == [
            "| `fast`",
            "| `slow`",
            "| `absent`",
        ]

    def test_shares_are_percentages_and_intervals_are_shown_where_there_is_one(self):
        ours = row("ours", 0.9, 0.98, versus=0.03, closed_gap=0.5)
        worse = row("worse", 0.9, 0.94, versus=-0.01, closed_gap=-0.2)
        base = row("base", 0.9, 0.95, spread=0.01)

        found = lines("on_time", [ours, worse, base], "base", {0.9: 0.999})

        assert found[0] == "**on_time, %**, median of 3 runs [95 %]"
        assert found[2] == "| policy | at 0.9 | less `base` |"
        assert found[4:] == [
            "| `ours` | 98.0 | +3.0, 50% of the way |",
            "| `base` | 95.0 [94.0, 96.0] |  |",
            "| `worse` | 94.0 | -1.0 |",
            "| bound | 99.9 |  |",
        ]

    def test_smaller_figures_have_more_digits(self):
        """As many as tell something: milliseconds below a second, tenths from ten on."""
        rows = [row("a", 1, 0.0312, versus=2.0, is_ratio=True), row("b", 1, 12.34, is_ratio=True)]

        assert lines("ttft_p90_s", rows, "b")[2:] == [
            "| policy | at 1 | `b` / it |",
            "|---|---|---|",
            "| `a` | 0.031 | 2.00 |",
            "| `b` | 12.3 |  |",
        ]
