"""The demo as a person runs it: short here, but the whole way."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from dispatcher import demo
from dispatcher.cli.demo import judge
from scheduler.sim import profile
from scheduler.sim.workload import Arrival

HEADGATE = Path(sys.executable).with_name("headgate")


def rows(*at_s):
    return tuple(Arrival(at_s=at, prompt_tokens=1000, output_tokens=100) for at in at_s)


class TestFitted:
    def test_the_first_rows_at_the_rate_wanted(self):
        """Cut first and scaled then, so that a slow beginning is not a slow demo."""
        quiet, busy = np.arange(100.0, 200.0, 1.0), np.arange(200.0, 210.0, 0.01)

        window = demo.fitted(rows(*quiet, *busy), rate_per_s=10.0, duration_s=5.0)

        assert len(window) == 50
        assert (window[0].at_s, round(window[-1].at_s, 6)) == (0.0, 4.9)

    def test_never_more_than_can_be_built(self):
        """A rate with three zeros too many stays bounded."""
        window = demo.fitted(rows(*range(5000)), rate_per_s=1e6, duration_s=60.0)

        assert len(window) == demo.PROMPTS_BUILT


class TestCapacity:
    def test_a_faster_gpu_carries_more_and_two_carry_both(self):
        """The estimate has the right order, which is all that it is for."""
        work = rows(0.0, 1.0)
        one, other = profile.load("h100"), profile.load("a30")

        assert demo.capacity([one], work) > 2 * demo.capacity([other], work)
        assert demo.capacity([one, other], work) == pytest.approx(
            demo.capacity([one], work) + demo.capacity([other], work)
        )


def test_it_ends_by_itself_with_every_request_answered(tmp_path):
    """Exit 0, every request with a terminal record, the picture as a file."""
    ran = subprocess.run(
        [
            *(HEADGATE, "demo", "--seconds", "5", "--rate", "6", "--json"),
            *("--svg", str(tmp_path / "demo.svg"), "--endpoints", "4"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )

    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["sent"], report["unended"]) == (30, 0)
    assert sum(report["outcomes"].values()) == 30
    assert {one["name"] for one in report["classes"]} <= {"chat", "code", "summarise", "batch"}
    assert sum(one["served"] for one in report["endpoints"]) == report["outcomes"]["completed"]
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("unended", [0, 1])
def test_one_request_without_a_record_fails_the_demo(unended):
    """A single request that was sent and never ended makes the exit code 1; none leaves it alone."""
    report = demo.Report(
        at_s=1.0,
        sent=2,
        total=2,
        outcomes={"completed": 2 - unended},
        unended=unended,
        classes=[],
        ttft=None,
        tpot=None,
        endpoints=[],
        errors=[],
        error_stretch_s=1.0,
        error_cold=None,
        error_warm=None,
        late_s=0.0,
        time_scale=1.0,
    )
    with pytest.raises(typer.Exit) if unended else contextlib.nullcontext() as caught:
        judge(report)

    assert caught is None or caught.value.exit_code == 1


def test_a_bad_trace_is_one_line(tmp_path):
    """Named with its line, before anything is started."""
    (tmp_path / "t.jsonl").write_text('{"trace": "t"}\n{"t": 1}\n')

    ran = subprocess.run(
        [HEADGATE, "demo", "--trace", tmp_path / "t.jsonl"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ran.returncode, ran.stdout) == (2, "")
    assert "t.jsonl, line 2" in ran.stderr
