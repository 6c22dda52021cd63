"""The evaluation's cells: each can be set up, is resumed where it stopped, and comes out as a table."""

import json
import signal
import subprocess
import sys

import msgspec
import pytest
from typer.testing import CliRunner

from dispatcher.cli import cells as command
from dispatcher.cli import compare, lab_policy
from scheduler.errors import HeadgateError
from scheduler.sim import cells, contrast, shape, workload
from scheduler.sim.report import Report
from scheduler.sim.workload import Arrival

LIST = """
[defaults]
windows = [20, 30]
window_s = 10
run_in_s = 20
seeds = 2
[policies]
few = ["least-request", "fcfs"]
[cells.small]
asks = "anything"
fleet = "a100x4"
policies = "few"
baseline = "fcfs"
metrics = ["on_time", "ttft_mean_s"]
loads = [0.5, 1]
parts = [{trace = "small", promise = [{ttft_ms = 500}]}]
"""


@pytest.fixture
def files(tmp_path):
    """A trace of 40 seconds, and a list with one cell on it."""
    rows = [{"t": at / 4, "i": 300 + 40 * (at % 9), "o": 5} for at in range(160)]
    lines = [{"trace": "small", "rows": 160, "format": 1}, *rows]
    (tmp_path / "small.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (tmp_path / "list.toml").write_text(LIST)
    return tmp_path


def run(*words):
    found = CliRunner().invoke(command.app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


def ran(files, *words):
    run("cells", "run", "--list", files / "list.toml", "--traces", files, "--out", files / "out",
        "--jobs", 1, *words)  # fmt: skip
    return (files / "out" / "small.jsonl").read_text().splitlines()


class TestShipped:
    def test_every_cell_can_be_set_up(self):
        """Fleets stand, know all policies of their cell, and windows lie apart from where policies are tuned."""
        rows = tuple(
            Arrival(at_s=at / 2, prompt_tokens=200, output_tokens=9, session=at // 8, turn=1)
            for at in range(3600)
        )
        for name, cell in cells.shipped().cells.items():
            made = cells.lab(name, cell, 0, lambda _: rows)
            for label in cell.policies:
                made.admit(lab_policy.named(label))
            assert made.work.arrivals
            assert (made.cut > 0) == (cell.run_in_s > 0), name
            assert cell.closed or min(cell.windows) >= 740
            assert cell.closed or max(cell.windows) + cell.window_s <= 1200

    def test_tables_of_nothing_are_refused(self, files):
        """A folder that is not there is named; no empty table is shown for it."""
        with pytest.raises(
            HeadgateError, match="'/nowhere' is no directory, wanted one that `cells run` wrote"
        ):
            run("cells", "table", "/nowhere", "--list", files / "list.toml")

    def test_an_unknown_cell_or_key_says_what_exists(self, files):
        with pytest.raises(HeadgateError, match="cell is 'A9', wanted one of: A1-conv"):
            run("cells", "list", "A9")
        (files / "list.toml").write_text(LIST.replace("asks", "ask"))
        with pytest.raises(HeadgateError, match=r"small: .*ask"):
            run("cells", "list", "--list", files / "list.toml")
        book = cells.parse(LIST.replace('policies = "few"', 'policies = ["few", "edf"]'), "list")
        assert book.cells["small"].policies == ("least-request", "fcfs", "edf")
        (files / "list.toml").write_text(LIST.replace('policies = "few"', 'policies = "many"'))
        with pytest.raises(HeadgateError, match="'many', wanted one of: few"):
            run("cells", "list", "--list", files / "list.toml")

    def test_a_missing_trace_is_named(self, files):
        (files / "small.jsonl").unlink()
        with pytest.raises(HeadgateError, match=r"no trace small.jsonl or small.jsonl.gz"):
            ran(files)


def test_a_closer_bound_stands_beside_what_was_run(files):
    """A row a draw, of the asked load alone; never above the pooled server's, nor under what somebody had."""
    ran(files, "--windows", 1)
    given = "--list", files / "list.toml", "--traces", files, "--out", files / "out", "--jobs", 1

    rows = [
        [word.strip() for word in line.split("|")[1:-1]]
        for line in run("cells", "bound", *given, "--load", "1").splitlines()
        if line.startswith("| at")
    ]

    assert [(row[0], row[1], row[2]) for row in rows] == [("at 1", "20", "0"), ("at 1", "20", "1")]
    for *_, pooled, closer, ours, best, who in rows:
        assert float(best) <= float(closer) <= float(pooled)
        assert (ours, who) in {("", "`fcfs`"), ("", "`least-request`")}


class TestRun:
    def test_goes_on_where_it_stopped(self, files):
        """Two windows, two seeds, two loads and two policies, each once; a line cut off by a kill runs again."""
        lines = ran(files, "--seeds", 1)
        assert len(lines) == 8
        path = files / "out" / "small.jsonl"
        path.write_text("\n".join(lines)[:-20])

        again = [json.loads(line) for line in ran(files)]

        keys = [(one["policy"], one["load"], one["window"], one["seed"]) for one in again]
        assert len(keys) == len(set(keys)) == 16
        assert lines[:7] == path.read_text().splitlines()[:7]
        assert all(
            one["capacity_rps"] * one["load"] == pytest.approx(one["rate_rps"]) for one in again
        )
        assert all(one["n"] == 40 for one in again), "the run-in is played and not measured"

    def test_refuses_whom_the_fleet_does_not_suit_before_anything_is_run(self, files):
        """Not after the capacity was measured and the others have run."""
        text = LIST.replace('"a100x4"', '"pd-a100x4-a100x4"')
        (files / "list.toml").write_text(text)

        with pytest.raises(HeadgateError, match="'random' does not part prefill from decode"):
            ran(files, "--policy", "fcfs,random")

        assert not (files / "out" / "small.jsonl").exists()

    def test_takes_a_profile_from_a_file(self, files):
        """As `simulate` does: the core with somebody's own choice of endpoints."""
        profile = files / "mine.toml"
        profile.write_text('[profile]\nscorers = [{name = "queue-scorer"}]\n')

        lines = ran(files, "--policy", f"plan:profile={profile}", "--seeds", 1, "--windows", 1)

        assert {json.loads(line)["policy"] for line in lines} == {f"plan:profile={profile}"}

    def test_loads_by_what_the_baseline_keeps(self, files):
        """Found once for each draw, as near as its arrivals allow; every policy of the draw meets the same load."""
        text = LIST.replace("loads = [0.5, 1]", "keeps = [0.9, 0.5]").replace("500", "150")
        (files / "list.toml").write_text(text)

        lines = ran(files, "--seeds", 1)
        found = [json.loads(line) for line in lines]

        loads = {}
        for one in found:
            loads.setdefault((one["window"], one["keeps"]), set()).add(one["load"])
            if one["policy"] == "fcfs":
                assert one["on_time"] == pytest.approx(one["keeps"], abs=0.1)
        assert len(loads) == 4
        assert all(len(shared) == 1 for shared in loads.values())
        shown = run("cells", "table", files / "out", "--list", files / "list.toml")
        assert "| policy | `fcfs` keeps 50% | less `fcfs` | `fcfs` keeps 90% |" in shown

        (files / "out" / "small.jsonl").write_text("\n".join(lines[1:]) + "\n")
        again = json.loads(ran(files, "--seeds", 1, "--load", 0.9)[-1])
        assert [again[key] for key in ("policy", "keeps", "load")] == [
            found[0][key] for key in ("policy", "keeps", "load")
        ]
        with pytest.raises(HeadgateError, match=r"what fcfs keeps, wanted some of: 0.9, 0.5"):
            ran(files, "--load", 0.7)

    def test_at_a_glance_who_is_short_of_runs_is_told(self, files):
        """One seed of two, and nobody of ours: nothing to judge."""
        ran(files, "--seeds", 1, "--policy", "fcfs,least-request,plan")

        shown = run("cells", "table", files / "out", "--brief", "--list", files / "list.toml")

        assert "| small | at 0.5 | 2 of 4 | " in shown
        assert "**By family**" in shown
        assert "median of 2 of 4 runs" in run(
            "cells", "table", files / "out", "--list", files / "list.toml"
        )

    def test_a_table_pairs_by_window_and_seed(self, files):
        ran(files)

        shown = run("cells", "table", files / "out", "--list", files / "list.toml")

        assert "### small: anything" in shown
        assert "**on_time, %**, median of 4 runs [95 %]" in shown
        assert "| policy | at 0.5 | less `fcfs` | at 1 | less `fcfs` |" in shown
        assert "| `least-request` | " in shown
        assert "| bound | " in shown
        assert "### All of them" in shown
        result = CliRunner().invoke(compare.app, [str(files / "out" / "small.jsonl")])
        assert "least-request" in result.output

    def test_a_win_must_be_sure_and_large_enough(self):
        """Of three loads one is clearly better, one better by a hair, and one better only at times."""
        reports = [
            msgspec.convert(
                dict.fromkeys(Report.__struct_fields__, 0)
                | {"policy": name, "load": load, "seed": seed, "ttft_mean_s": value}
                | {"window": "", "fleet": "", "trace": "", "by_tenant": {}, "curves": None}
                | {"on_time_by_decile": [], "keeps": None},
                Report,
            )
            for seed in range(10)
            for load, ours, theirs in (
                (0.5, 1.0, 2.0),
                (0.7, 1.0, 1.01),
                (0.9, 1.0, 1.3 if seed % 2 else 0.8),
            )
            for name, value in (("plan", ours), ("other", theirs))
        ]

        [found] = contrast.standings([("ttft_mean_s", reports)], ours="plan")

        assert (found.n_won, found.n_lost, found.n_places) == (1, 0, 3)
        assert found.overall == pytest.approx((2.0 * 1.01 * 1.05) ** (1 / 3))


CREW = """
import time
from dispatcher.cli.download import FileError
from dispatcher.cli.crew import Crew
def begin():
    print("begun", flush=True)
def work():
    time.sleep(0.01)
with Crew(2, begin) as crew:
    crew.all("work", work, [()] * 20_000)
"""


class TestCrew:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_children_end_with_their_parent(self, number):
        """Whatever the parent alone dies of, nobody is left who holds its output open."""
        command = [sys.executable, "-c", CREW]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
            parent.stdout.readline()
            parent.send_signal(number)
            parent.communicate()  # to the end of what its children write, too

        assert parent.returncode == -number


class TestShape:
    def test_a_mix_has_the_shares_wanted(self):
        """Slow traces set the pace; nobody is sped up."""
        fast = [Arrival(at_s=at / 10, prompt_tokens=1, output_tokens=1) for at in range(1000)]
        slow = [Arrival(at_s=float(at), prompt_tokens=2, output_tokens=1) for at in range(100)]

        mix = shape.mixed([(fast, 0.5), (slow, 0.5)], start_s=10.0, window_s=50.0)

        counts = [sum(a.prompt_tokens == n for a in mix) for n in (1, 2)]
        assert counts == pytest.approx([50, 50], abs=1)
        assert mix[-1].at_s < 50.0
        assert [a.at_s for a in mix] == sorted(a.at_s for a in mix)

    def test_groups_share_what_was_asked(self):
        """Half of each prompt is found in the group's other prompts, and nothing of another group's."""
        rows = [Arrival(at_s=float(at), prompt_tokens=640, output_tokens=1) for at in range(200)]
        grouped = shape.grouped(rows, groups=4, share=0.5)

        assert {len(a.blocks) * a.block_tokens for a in grouped} == {320}
        assert len({a.blocks for a in grouped}) == 4
        assert len({block for a in grouped for block in a.blocks}) == 4 * 20

    def test_a_crowd_keeps_every_row(self):
        rows = [Arrival(at_s=float(at), prompt_tokens=1, output_tokens=1) for at in range(100)]
        crowd = shape.crowded(rows, 20.0, 10.0, 3.0)

        assert len(crowd) == 100
        inside = [a for a in crowd if 20.0 <= a.at_s < 30.0]
        assert workload.rate(inside) == pytest.approx(3.0, rel=0.01)
        assert crowd[-1].at_s == pytest.approx(79.0)
