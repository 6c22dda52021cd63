"""The evaluation at a glance, on results made by hand: who is the best other, by how much, and what is left out."""

import msgspec
import pytest

from dispatcher.cli import brief
from scheduler.sim import contrast, policy, verdict
from scheduler.sim.report import Report
from scheduler.sim.verdict import Cell, Sides

SIDES = Sides(ours="plan", oracle="oracle", is_peer=policy.is_peer)

NOTHING = dict.fromkeys(Report.__struct_fields__, 0) | {
    "window": "760", "fleet": "", "trace": "", "by_tenant": {}, "curves": None, "keeps": None,
    "on_time_by_decile": [], "ttft_mean_bound_s": None, "on_time_bound": None,
}  # fmt: skip


def reports(metric, by_policy, load=0.9, **fields):
    """A run of each policy with each of its values, seed by seed."""
    return [
        msgspec.convert(
            NOTHING | {"policy": name, "load": load, "seed": seed, metric: value} | fields, Report
        )
        for name, values in by_policy.items()
        for seed, value in enumerate(values)
    ]


def judged(metric, runs, name="A1-x", baseline="base"):
    cell = Cell(name=name, baseline=baseline, figures=contrast.figures(runs, metric))
    return verdict.verdicts(cell, SIDES)


class TestBest:
    def test_the_best_other_has_the_best_median_and_is_somebody_elses(self):
        """The oracle cannot exist and the core's other settings are ours: neither is a peer, however good."""
        runs = reports(
            "ttft_mean_s",
            {"plan": [1.0] * 4, "base": [3.0] * 4, "good": [1.2, 1.1, 1.2, 1.5],
             "lucky": [0.5, 2.0, 2.0, 2.0], "oracle": [0.1] * 4, "plan:fill=0": [0.2] * 4,
             "core-fcfs": [0.3] * 4},
        )  # fmt: skip

        [one] = judged("ttft_mean_s", runs)

        assert (one.peer, one.peer_value, one.oracle) == ("good", 1.2, 0.1)
        assert one.over_peer == pytest.approx((1.2, 1.1, 1.2, 1.5)), (
            "paired by seed, above 1 is better"
        )
        assert one.over_baseline == pytest.approx((3.0,) * 4)
        assert one.mark == "won"

    def test_of_shares_and_rates_more_is_better(self):
        """Shares by what they differ, rates by how many times as much."""
        runs = {"plan": [0.9], "base": [0.5], "high": [0.95], "low": [0.2]}

        [share] = judged("on_time", reports("on_time", runs))
        [rate] = judged("decode_tokens_per_s", reports("decode_tokens_per_s", runs))

        assert (share.peer, rate.peer) == ("high", "high")
        assert share.over_peer == pytest.approx((-0.05,))
        assert rate.over_peer == pytest.approx((0.9 / 0.95,))
        assert rate.over_baseline == pytest.approx((1.8,))

    def test_a_place_is_lost_as_it_is_won(self):
        """Surely, and by three per cent or a point; else it is level."""
        marks = [
            judged("on_time", reports("on_time", {"plan": [ours] * 4, "base": theirs}))[0].mark
            for ours, theirs in ((0.9, [0.95] * 4), (0.9, [0.905] * 4), (0.9, [0.7, 0.99] * 2))
        ]
        [three] = judged("on_time", reports("on_time", {"plan": [0.9] * 3, "base": [0.5] * 3}))

        assert marks == ["lost", "level", "level"]
        assert three.mark is None, "of so few runs nothing can be sure"

    def test_gaps_to_the_bound_of_baseline_and_best(self):
        """From 0.5 to 0.9 on the way to 1 are four fifths; from 0.8 half."""
        runs = reports("on_time", {"plan": [0.9], "base": [0.5], "good": [0.8]}, on_time_bound=1.0)

        [one] = judged("on_time", runs)

        assert one.closed_gap == pytest.approx(0.8)
        assert one.closed_rest == pytest.approx(0.5)
        assert one.bound == 1.0


class TestDraws:
    def test_all_figures_are_of_the_same_draws(self):
        """Those of ours and the baseline; whoever lacks one of them takes no part, and is named."""
        runs = reports(
            "on_time",
            {"plan": [0.9, 0.8, 0.1], "base": [0.5, 0.5], "half": [0.99], "all": [0.7, 0.7, 0.7]},
        )

        [one] = judged("on_time", runs)

        assert one.draws == (("760", 0), ("760", 1))
        assert one.ours.median == pytest.approx(0.85)
        assert (one.peer, one.left_out) == ("all", {"half": 1})

    def test_a_place_without_ours_or_the_baseline_says_nothing(self):
        assert judged("on_time", reports("on_time", {"plan": [0.9], "other": [0.5]})) == []

    def test_tails_of_few_runs_are_not_told(self):
        few, enough = ({"plan": [1.0] * n, "base": [2.0] * n} for n in (19, 20))

        assert judged("ttft_p99_s", reports("ttft_p99_s", few)) == []
        [one] = judged("ttft_p99_s", reports("ttft_p99_s", enough))
        assert len(one.draws) == 20


def two_places():
    """One place four times and one as good as the baseline; once far ahead of the best other, once behind."""
    near = reports("ttft_mean_s", {"plan": [1.0] * 4, "base": [4.0] * 4, "good": [1.1] * 4}, 0.5)
    far = reports("ttft_mean_s", {"plan": [2.0] * 4, "base": [2.0] * 4}, 0.9)
    return judged("ttft_mean_s", near + far)


class TestFamilies:
    def test_ratios_are_multiplied_and_points_are_averaged(self):
        [seconds] = verdict.families(two_places())
        shares = [
            one
            for name, ours in (("K1-a", 0.9), ("K1-b", 0.6))
            for one in judged("on_time", reports("on_time", {"plan": [ours], "base": [0.5]}), name)
        ]
        [points] = verdict.families(shares)

        assert seconds.over_baseline.median == pytest.approx(2.0)
        assert seconds.over_peer.median == pytest.approx(1.1**0.5)
        assert (seconds.name, seconds.n_places) == ("A1", 2)
        assert (seconds.n_beside_peer, seconds.n_ahead) == (2, 1)
        assert (seconds.worst.place, seconds.worst.peer) == (0.9, "base")
        assert seconds.marks == {"won": 1, "level": 1, "lost": 0}
        assert points.over_baseline.median == pytest.approx(0.25)

    def test_the_interval_is_of_the_same_draws_at_all_places(self):
        """Where one draw is good everywhere and another bad everywhere, places do not even each other out."""
        alike = [[1.0, 2.0], [1.0, 2.0]]

        found = verdict.overall(alike, is_ratio=True)

        assert (found.low, found.high) == (1.0, 2.0)

    def test_every_policy_beside_the_baseline(self):
        """One that was not run everywhere says at how many places it was."""
        found = verdict.over_baseline(two_places())

        assert found["plan"] == (pytest.approx(2.0), 2)
        assert found["good"] == (pytest.approx(4.0 / 1.1), 1)
        assert found["base"] == (1.0, 2)


def at(cell, place):
    return f"at {place:g}"


class TestMarkdown:
    def test_a_row_a_place(self):
        runs = reports(
            "on_time",
            {"plan": [0.9, 0.9], "base": [0.5, 0.5], "good": [0.8, 0.8], "half": [1.0], "oracle": [0.99] * 2},
            on_time_bound=1.0,
        )  # fmt: skip

        text = brief.places(judged("on_time", runs), "plan", lambda _: 20, at).splitlines()

        assert text[2].startswith("| cell | at | runs | `plan` | best other | it | less it |  | ")
        assert text[4] == (
            "| A1-x | at 0.9 | 2 of 20 | 90.0 | `good` | 80.0 | +10.0 |  | +40.0 | 80% | 50% | 100.0 | 99.0 |"
        )
        assert text[6] == "A1-x: run in too few of these draws to take part: `half` (1)."
        assert "| 2 | 90.0 |" in brief.places(judged("on_time", runs), "plan", lambda _: 2, at)

    def test_a_row_a_family(self):
        text = brief.families(verdict.families(two_places()), "plan", at).splitlines()

        assert text[4] == (
            "| A1 | ttft_mean_s | 2 | 4 | `base` | 2.00 | 1.05 | 1 / 1 / 0 | 50% | A1-x at 0.9: `base` 1.00 |"
        )

    def test_a_row_a_policy(self):
        text = brief.policies(two_places()).splitlines()

        assert text[0] == "**ttft_mean_s**: `base` / it, geometric mean over a family's places"
        assert text[2:] == [
            "| policy | A1 (2) |",
            "|---|---|",
            "| `good` | 3.64 (of 1) |",
            "| `plan` | 2.00 |",
            "| `base` | 1.00 |",
        ]
