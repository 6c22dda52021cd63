"""Off-policy estimates beside the truth, at several loads: `python tests/bench/off_policy.py [ARRIVALS]`.

One run with wide exploration is the log; each target is estimated from it and then really run, on the same machines
and arrivals. What is left between the two is what no such estimate sees: the queues and caches that the target makes.
"""

import sys

import numpy as np

from scheduler import evaluate
from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import SettingsError
from scheduler.events import Assign
from scheduler.plan import PlanSettings
from scheduler.sim import arriving, fleet, workload
from scheduler.sim.fleet import EndpointSpec, Fleet
from scheduler.sim.world import World
from scheduler.wire.worker import Reward

FLEET = Fleet(
    name="mixed",
    endpoints=(EndpointSpec(profile="a100", count=2), EndpointSpec(profile="l40s", count=2)),
)
RATES_RPS = {"0.3": 9.8, "0.6": 19.7, "0.85": 27.9}
"By load: multiples of its capacity of 32.8 requests a second."

EXPLORE = 0.5
TARGETS = {
    "plan": PlanSettings(),
    "earliest-finish": PlanSettings(fill=0.0, tie=0.0),
    "plan:fill=2": PlanSettings(fill=2.0),
    "plan:explore=0.2": PlanSettings(explore=0.2),
    "plan:explore=100": PlanSettings(explore=100.0),
}
"Each as `evaluate` names it and as the core runs it; the last draws evenly."


class Tap:
    """A core whose decisions and rewards are kept."""

    def __init__(self, core: Scheduler) -> None:
        self.core = core
        self.decisions, self.rewards = [], []
        self.wakeup_at = core.wakeup_at

    def receive(self, event, now):
        if isinstance(event, Reward):
            self.rewards.append(event)
        self.core.receive(event, now)

    def decide(self, now):
        commands = self.core.decide(now)
        self.decisions += [one.decision for one in commands if isinstance(one, Assign)]
        return commands


def run(plan: PlanSettings, rate_rps: float, n: int) -> Tap:
    rng = np.random.default_rng(5)
    rows = arriving.rows(
        tuple(
            workload.Arrival(
                at_s=float(at) / rate_rps,
                prompt_tokens=int(np.clip(rng.lognormal(6.8, 1.0), 16, 12_000)),
                output_tokens=int(np.clip(rng.lognormal(4.5, 0.8), 2, 800)),
                ttft_s=2.0,
            )
            for at in np.cumsum(rng.exponential(1.0, n))
        )
    )
    tap = Tap(Scheduler(CoreSettings(plan=plan), np.random.default_rng([0, 2])))
    World(rows, fleet.machines(FLEET, 0), delays=FLEET.delays, is_open=False).run(tap)
    return tap


def mean_s(tap: Tap) -> float:
    """Seconds from the decision to the first token."""
    return float(np.mean([r.first_token_at - r.decided_at for r in tap.rewards]))


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    sys.stdout.write("| load | target | truth | as logged | IPS | SNIPS | DR | effective |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for load, rate_rps in RATES_RPS.items():
        log = run(PlanSettings(explore=EXPLORE), rate_rps, n)
        logged, _ = evaluate.joined(log.decisions, log.rewards)
        for label, plan in TARGETS.items():
            truth = mean_s(run(plan, rate_rps, n))
            try:
                one = evaluate.estimate(logged, evaluate.named(label), label=label, metric="ttft_s")
            except SettingsError as error:
                sys.stdout.write(f"| {load} | `{label}` | {truth:.3f} | refused: {error} |\n")
                continue
            shown = " | ".join(
                f"{part.value:.3f} [{part.low:.3f}, {part.high:.3f}]"
                for part in (one.ips, one.snips, one.dr)
            )
            sys.stdout.write(
                f"| {load} | `{label}` | {truth:.3f} | {one.logged.value:.3f} | {shown} "
                f"| {one.n_effective:.0f} |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
