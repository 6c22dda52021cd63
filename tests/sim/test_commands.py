"""`headgate simulate`, `compare` and `capacity`: documented keys, same bytes, and clear words for bad input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dispatcher.cli import capacity, compare, simulate
from scheduler.errors import HeadgateError
from scheduler.sim import policy
from scheduler.sim.catalogue import FLEETS
from scheduler.sim.report import Report

KEYS = """policy load rate_rps seed n n_completed n_expired n_rejected on_time on_time_weighted ttft_attainment
    tpot_attainment e2e_attainment ttft_mean_s ttft_p50_s ttft_p90_s ttft_p99_s tpot_mean_s tpot_p99_s goodput_rps
    decode_tokens_per_s cache_hit preemptions aborts wasted_tokens fairness_jain max_wait_s decide_us_p50
    decide_us_p99 wall_s"""


@pytest.fixture
def trace(tmp_path):
    """40 seconds of one request each, every fourth long."""
    rows = [
        {
            "t": float(at),
            "i": 6000 if at % 4 == 0 else 300,
            "o": 20,
            "h": [0, at],
            "c": "ab"[at % 2],
        }
        for at in range(40)
    ]
    for row in rows:
        row["h"] = row["h"] if row["i"] > 512 else [0]
    lines = [{"trace": "small", "rows": 40, "format": 1, "block": 512}, *rows]
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text('[[endpoints]]\nprofile = "a100"\n[[endpoints]]\nprofile = "l40s"\n')
    return path


@pytest.fixture
def slo(tmp_path):
    path = tmp_path / "slo.toml"
    path.write_text(
        '[[classes]]\nclient = "a"\nttft_ms = 300\nttft_prefills = 2.0\nweight = 3.0\n'
        "[[classes]]\nttft_ms = 500\ntpot_ms = 60\n"
    )
    return path


def run(app, *words):
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def simulated(trace, fleet, out, *words):
    found = run(
        simulate.app, "--trace", trace, "--fleet", fleet, "--json", out, "--jobs", 1, *words
    )
    assert found.exit_code == 0, found.output
    return json.loads(out.read_text())


class TestSimulate:
    def test_one_object_a_cell_and_seed(self, trace, fleet, slo, tmp_path):
        """Policies x loads x seeds, each with every promised key, paired by seed."""
        words = ("--policy", "plan,round-robin", "--load", "0.5,1", "--seeds", 2, "--slo", slo)
        found = simulated(trace, fleet, tmp_path / "out.json", *words)

        cells = [(one["policy"], one["load"], one["seed"]) for one in found]
        assert len(cells) == len(set(cells)) == 8
        for one in found:
            assert set(KEYS.split()) <= set(one)
            assert one["n"] == 40 == one["n_completed"]
            assert one["rate_rps"] == pytest.approx(one["load"] * one["capacity_rps"])
            assert one["on_time_weighted"] != one["on_time"] or one["on_time"] in (0, 1)
        assert found[0]["capacity_rps"] != found[1]["capacity_rps"], "machines differ by seed"

    def test_slices_and_rates(self, trace, fleet, tmp_path):
        """A slice is in seconds of the trace; a rate needs no capacity."""
        words = ("--slice", "10:20", "--rate", 2, "--policy", "plan", "--untimed")
        first = simulated(trace, fleet, tmp_path / "a.json", *words)
        again = simulated(trace, fleet, tmp_path / "b.json", *words)

        assert first == again
        assert [(one["n"], one["rate_rps"], one["load"]) for one in first] == [(10, 2.0, None)]

    def test_processes_change_nothing(self, trace, fleet, tmp_path):
        """Cells run side by side give what they give one after the other."""
        words = ("--rate", 2, "--policy", "plan,fcfs,lodestar", "--seeds", 2, "--untimed")
        alone = simulated(trace, fleet, tmp_path / "a.json", *words)

        assert simulated(trace, fleet, tmp_path / "b.json", *words, "--jobs", 2) == alone

    def test_shapes_the_work(self, trace, fleet, tmp_path):
        """Blocks of 50 tokens shrink prompts; prompts are cut; outputs can be left out."""
        words = ("--rate", 1, "--block-tokens", 50, "--prompt-max", 400, "--output-scale", 0)
        (found,) = simulated(trace, fleet, tmp_path / "a.json", *words)

        assert found["n_completed"] == 40
        assert found["tpot_mean_s"] is None

    def test_says_what_lengths_are_worth(self, trace, fleet, slo, tmp_path):
        """Three runs that differ in nothing but what requests say of their answers."""
        words = ("--rate", 40, "--policy", "plan", "--slo", slo, "--untimed", "--output-scale", 20)
        found = {
            lengths: simulated(trace, fleet, tmp_path / lengths, *words, "--lengths", lengths)[0]
            for lengths in ("unknown", "predicted", "known")
        }

        assert {one["n_completed"] for one in found.values()} == {40}
        assert found["unknown"]["ttft_mean_s"] != found["known"]["ttft_mean_s"]

    def test_figures_by_tenant(self, trace, fleet, tmp_path):
        """Each tenant that is named, and together they are all."""
        slo = tmp_path / "tenants.toml"
        slo.write_text(
            '[[classes]]\nclient = "a"\ntenant = "gold"\nttft_ms = 100\n[[classes]]\ntenant = "iron"\n'
        )
        (found,) = simulated(trace, fleet, tmp_path / "out", "--rate", 2, "--slo", slo)

        gold, iron = found["by_tenant"]["gold"], found["by_tenant"]["iron"]
        assert gold["n"] == iron["n"] == 20
        assert (gold["on_time"] + iron["on_time"]) / 2 == pytest.approx(found["on_time"])
        assert gold["on_time"] < iron["on_time"] == 1.0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--policy", "plam", "--load", 1), "policy is 'plam', wanted one of: plan"),
            (("--fleet", "a30x9", "--load", 1), "fleet is 'a30x9', wanted a TOML file or one of"),
            (("--slo", "/nowhere.toml", "--load", 1), "cannot read '/nowhere.toml'"),
            (("--slice", "100:200", "--load", 1), "no arrival in this slice"),
        ],
    )
    def test_bad_input_is_named(self, trace, fleet, words, message):
        with pytest.raises(HeadgateError, match=message):
            run(simulate.app, "--trace", trace, "--fleet", fleet, "--jobs", 1, *words)

    def test_a_wrong_trace_line_is_named(self, trace, fleet):
        with trace.open("a") as file:
            file.write('{"t": -1, "i": 1, "o": 1}\n')
        with pytest.raises(HeadgateError, match=r"small.jsonl, line 42: t is -1"):
            run(simulate.app, "--trace", trace, "--fleet", fleet, "--load", 1)

    def test_a_fleet_too_small_for_the_prompts_says_so_before_it_runs(self, trace, tmp_path):
        path = tmp_path / "tiny.toml"
        path.write_text('[[endpoints]]\nprofile = "a30"\n[endpoints.engine]\nkv_tokens = 256\n')
        with pytest.raises(HeadgateError, match="holds at most 256 tokens, no prompt"):
            run(simulate.app, "--trace", trace, "--fleet", path, "--load", 1)

    def test_load_or_rate(self, trace):
        assert run(simulate.app, "--trace", trace).exit_code == 2


def test_the_page_knows_every_name():
    """docs/EVALUATION.md names each policy, fleet and key of the JSON."""
    page = (Path(__file__).parents[2] / "docs" / "EVALUATION.md").read_text()
    names = [*policy.BY_NAME, *FLEETS, *Report.__struct_fields__]
    assert [name for name in names if f"`{name}`" not in page] == []


class TestCompare:
    def test_table_and_pictures(self, trace, fleet, tmp_path):
        """Intervals, differences to the baseline, and one page with every picture inside."""
        words = ("--policy", "plan,random", "--load", "0.5,1", "--seeds", 2, "--curves")
        simulated(trace, fleet, tmp_path / "out.json", *words)

        plain = (tmp_path / "out.json", "--baseline", "random")
        found = run(compare.app, *plain, "--markdown", "--plots", tmp_path / "plots")

        assert found.exit_code == 0
        assert "| policy | at 0.5 | `random` / it | at 1 | `random` / it |" in found.output
        page = (tmp_path / "plots" / "index.html").read_text()
        assert page.count("data:image/png;base64,") == 6
        assert "http" not in page

    def test_an_unknown_baseline_or_figure_says_what_exists(self, trace, fleet, tmp_path):
        simulated(trace, fleet, tmp_path / "out.json", "--rate", 1)
        with pytest.raises(HeadgateError, match="baseline is 'edf', wanted one of: plan"):
            run(compare.app, tmp_path / "out.json", "--baseline", "edf")
        with pytest.raises(HeadgateError, match="metric is 'speed', wanted one of: "):
            run(compare.app, tmp_path / "out.json", "--metric", "speed")


class TestCapacity:
    def test_a_looser_share_carries_more(self, trace, fleet, slo):
        """The rate that keeps 50 % is at least the rate that keeps 99 %."""
        words = ("--trace", trace, "--fleet", fleet, "--slo", slo, "--seeds", 1, "--jobs", 1)
        found = run(capacity.app, *words, "--keep", "0.99,0.5")

        rates = [
            float(line.split("│")[3]) for line in found.output.splitlines() if "│ plan" in line
        ]
        assert 0 < rates[0] <= rates[1]

    def test_the_smallest_fleet(self, trace, slo, tmp_path):
        """More endpoints for a higher rate."""
        path = tmp_path / "one.toml"
        path.write_text('[[endpoints]]\nprofile = "l40s"\n')
        words = ("--trace", trace, "--fleet", path, "--slo", slo, "--seeds", 1, "--jobs", 1)
        sizes = []
        for rate in (1, 20):
            found = run(capacity.app, *words, "--keep", "0.9", "--rate", rate)
            line = next(line for line in found.output.splitlines() if "│ plan" in line)
            sizes.append(int(line.split("│")[3]))

        assert sizes[0] < sizes[1]
