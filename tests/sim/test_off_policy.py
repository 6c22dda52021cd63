"""Off-policy estimates from a recording of the lab, held against running the other policy there."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dispatcher.cli.root import root
from dispatcher.journal import Journal, Recorder
from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.plan import PlanSettings
from scheduler.profile.filters import InTime
from scheduler.profile.pickers import Random
from scheduler.profile.profile import Profile
from scheduler.sim import arriving, fleet, workload
from scheduler.sim.fleet import EndpointSpec, Fleet
from scheduler.sim.world import World

FLEET = Fleet(
    name="mixed",
    endpoints=(EndpointSpec(profile="a100", count=2), EndpointSpec(profile="l40s", count=2)),
)
RATE_RPS = 8.0
"A quarter of what the fleet can take: queues, which no estimate sees, hardly matter."


def run(path, **chosen):
    """A run of the core with these settings, its recording, and its mean seconds from decision to first token."""
    rng = np.random.default_rng(1)
    rows = arriving.rows(
        tuple(
            workload.Arrival(
                at_s=float(at),
                prompt_tokens=int(np.clip(rng.lognormal(6.8, 1.0), 16, 12_000)),
                output_tokens=int(np.clip(rng.lognormal(4.5, 0.8), 2, 800)),
                ttft_s=2.0,
            )
            for at in np.cumsum(rng.exponential(1 / RATE_RPS, 1200))
        )
    )
    settings = CoreSettings(**chosen)
    head = recording.head(settings, seed=0, version="0", pool="lab")
    journal = Journal(head, lambda _: path.open("xb"), bytes_max=2**40)
    core = Recorder(Scheduler(settings, np.random.default_rng(0)), journal)
    World(rows, fleet.machines(FLEET, 0), delays=FLEET.delays, is_open=False).run(core)
    journal.close("resigned")
    with path.open("rb") as file:
        _, lines = recording.read(enumerate(file, 1), name="test")
        rewards = [line.reward for line in lines if line.reward is not None]
    return float(np.mean([one.first_token_at - one.decided_at for one in rewards]))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A recording with wide exploration."""
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    run(path, plan=PlanSettings(explore=0.5))
    return path


@pytest.fixture(scope="module")
def by_profile(tmp_path_factory):
    """A recording of a profile whose picker leaves all to chance."""
    path = tmp_path_factory.mktemp("log") / "profile.jsonl"
    run(path, profile=Profile(filters=(InTime(),), picker=Random()))
    return path


def estimated(log, out, *words):
    app = root(["evaluate"])
    found = CliRunner().invoke(app, ["evaluate", str(log), "--json", str(out), *words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return json.loads(out.read_text()), found


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("plan", PlanSettings()),
        ("earliest-finish", PlanSettings(fill=0.0, tie=0.0)),
        ("plan:explore=100", PlanSettings(explore=100.0)),
    ],
)
def test_estimates_come_near_the_truth(log, tmp_path, name, plan):
    """At light load every estimator is within 12 % of really running the other choice."""
    truth = run(tmp_path / "truth.jsonl", plan=plan)

    [one], _ = estimated(log, tmp_path / "out.json", "--policy", name)

    assert one["n"] > 1000
    for which in ("ips", "snips", "dr"):
        assert one[which]["value"] == pytest.approx(truth, rel=0.12), which


def test_a_profiles_log_says_as_much(by_profile, tmp_path):
    """Its picker's chances stand beside every choice: what the plan would have brought comes out within 12 %."""
    truth = run(tmp_path / "truth.jsonl", plan=PlanSettings())

    [one], _ = estimated(by_profile, tmp_path / "out.json", "--policy", "plan")

    assert one["n"] > 1000
    assert one["support"] > 0.99
    for which in ("ips", "snips", "dr"):
        assert one[which]["value"] == pytest.approx(truth, rel=0.12), which


def test_the_better_is_told_from_the_worse(log, tmp_path):
    """Without running either: the plan is better than drawing at random, and the intervals do not touch."""
    found, told = estimated(log, tmp_path / "out.json", "--policy", "plan,random")

    plan, random = found
    assert plan["dr"]["high"] < random["dr"]["low"]
    assert "other queues" in told.output
