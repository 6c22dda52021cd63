"""Do the lab and the real system rank policies alike? `python tests/bench/harnesses.py [CELL...] --engines vllm`.

The same arrivals, promises, step times and settings twice: live, through a private Redis, dispatchers, a worker and a
dozen engines over HTTP, each a process, by the clock; and in the lab, in virtual time. The engines are of two speeds,
emulated ones or real vLLM servers on an emulated clock, started once for all runs; before each their caches are emptied.

Both play `--slower` times slower than the GPUs would, and nobody is told what GPUs they are: on one machine what the
front ends of a dozen servers take must be small beside a step. Figures are printed in GPU seconds.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from cells import CELLS, ENDPOINTS, POLICIES, Cell, arrivals
from fleets import PROBE_TOKENS, emulators, first_token_s, servers

from dispatcher.cli import lab_policy
from dispatcher.client import Client
from dispatcher.demo import Demo
from dispatcher.stack import Engine, Stack, Wanted
from scheduler.settings import Settings
from scheduler.sim import profile, workload
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fleet import CERTAIN, EndpointSpec, Fleet, Machine
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Promised
from scheduler.sim.workload import Workload

PROFILES = ("a100", "a30")
"In turn; the second computes a prompt in twice the time."

ENGINE = EngineSettings(max_num_seqs=128, block_size=32, scheduling_policy="priority")
VOCABULARY = 8000
"Of the servers' small model; prompts are token ids, whose number all engines see alike."

PATIENCE_S = 240.0
"After the last arrival: in overload all that waits is served, as in the lab."

LAB_SEEDS = 3
"Of the policies' own chance, there is no other. The lab's figure is the median."

LEVEL = 0.03
"Two policies whose figures differ by less are level: either may be first."

AGREED = 0.10

HEAD = """
| cell | policy | mean TTFT, s | | P99 TTFT, s | | on time | | cores, late |
|---|---|---|---|---|---|---|---|---|"""


class Figures(msgspec.Struct, frozen=True):
    """What both harnesses say."""

    ttft_mean_s: float
    ttft_p99_s: float
    on_time: float


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What every run stands on."""

    engines: tuple[Engine, ...]
    machines: tuple[Machine, ...]
    "The same in the lab."

    slower: float
    scratch: Path
    "One settings file a policy, logs of the live runs."


def ground(found: list[dict[str, str]], *, slower: float, scratch: Path) -> Ground:
    """Engines that run, and their twins in the lab.

    A request's front end is the machine's and not the profile's, which has it from another: what an idle server takes
    to a first token beside the step.
    """
    law = profile.load(found[0]["hardware"]).slowed(slower)
    step_s = law.step_s(1, PROBE_TOKENS, prefill_attention=PROBE_TOKENS**2 // 2)
    frontend_s = max(0.0, asyncio.run(first_token_s(found[0]["url"])) - step_s)
    said(f"{len(found)} engines; a lone request takes {1e3 * frontend_s:.1f} ms beside its step.")
    more = f"max_num_seqs={ENGINE.max_num_seqs},by_priority=true"
    machines = []
    for one in found:
        slow = profile.load(one["hardware"]).slowed(slower)
        actual = msgspec.structs.replace(slow, frontend_ms=1e3 * frontend_s)
        machines.append(
            Machine(
                name=one["name"], hardware="", nominal=slow, actual=actual, settings=ENGINE, seed=0
            )
        )
    return Ground(
        engines=tuple(Engine(name=one["name"], url=one["url"], more=more) for one in found),
        machines=tuple(machines),
        slower=slower,
        scratch=scratch,
    )


def virtual(on: Ground, rows: Workload, label: str) -> Figures:
    """In the lab."""
    config = on.scratch / f"{label}.toml"
    name = f"plan:profile={config}" if "[profile" in POLICIES[label] else label
    # The machines are given; a lab wants a fleet besides, for its delays.
    fleet = Fleet(
        name="twins",
        endpoints=(EndpointSpec(profile=PROFILES[0], count=len(on.machines)),),
        chance=CERTAIN,
    )
    stage = Lab(fleet=fleet, work=Promised(rows), machines=on.machines)
    reports = [
        stage.run(lab_policy.named(name), label=label, seed=seed, rate_rps=workload.rate(rows))[0]
        for seed in range(LAB_SEEDS)
    ]
    return Figures(
        statistics.median(one.ttft_mean_s or 0.0 for one in reports),
        statistics.median(one.ttft_p99_s or 0.0 for one in reports),
        statistics.median(one.on_time for one in reports),
    )


async def live(on: Ground, rows: Workload, label: str, run: str) -> tuple[Figures, str]:
    """Through the whole system; and how busy the machine was, how late requests were sent."""
    await forget(on.engines)
    # Read by each process of the stack.
    os.environ["HEADGATE_CONFIG"] = str(on.scratch / f"{label}.toml")
    wanted = Wanted(engines=on.engines)
    stack = Stack(Settings(), wanted, directory=on.scratch / run, told=said)
    async with stack, Client.from_settings(stack.settings, name="harness") as client:
        (model,) = stack.running.models
        play = Demo(
            client,
            rows,
            model=model,
            time_scale=1.0,
            vocabulary=VOCABULARY,
            patience_s=PATIENCE_S,
        )
        began_s, began_at = busy_s(), time.monotonic()
        report = await play.run()
        cores = (busy_s() - began_s) / (time.monotonic() - began_at)
    records = [record for record in play.records if record is not None]
    ttft = [one.ttft_s for one in records if one.ttft_s is not None]
    if report.outcomes.get("completed", 0) < len(rows):
        said(f"{run}: {report.outcomes} of {len(rows)}, {report.unended} without an end")
    on_time = sum(one.outcome == "completed" and one.on_time is not False for one in records)
    return (
        Figures(float(np.mean(ttft)), float(np.quantile(ttft, 0.99)), on_time / len(rows)),
        f"{cores:.2f}, {1e3 * report.late_s:.0f} ms",
    )


async def forget(engines: tuple[Engine, ...]) -> None:
    """Empty the prefix caches."""
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        for one in engines:
            async with http.post(f"{one.url}/reset_prefix_cache"):
                pass


def busy_s() -> float:
    """Core seconds that this machine has worked (Linux), whoever it was for."""
    words = Path("/proc/stat").read_text().split(maxsplit=11)[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = map(int, words)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def apart(one: float, other: float) -> float:
    """Their difference as a part of the larger."""
    return abs(one - other) / (max(one, other) or 1.0)


def disagreements(cell: str, both: dict[str, tuple[Figures, Figures]]) -> list[str]:
    """Two policies that change places, and figures further apart than `AGREED`."""
    wrong = []
    labels = list(both)
    for field in Figures.__struct_fields__:
        of = {label: [getattr(side, field) for side in both[label]] for label in labels}
        for at, one in enumerate(labels):
            if (off := apart(*of[one])) > AGREED:
                seen, thought = of[one]
                wrong.append(
                    f"{cell}, {one}: {field} {seen:.3f} live, {thought:.3f} in the lab, {off:.0%}"
                )
            for other in labels[at + 1 :]:
                are_apart = all(apart(of[one][n], of[other][n]) > LEVEL for n in (0, 1))
                if are_apart and (of[one][0] < of[other][0]) != (of[one][1] < of[other][1]):
                    wrong.append(f"{cell}: {one} and {other} change places in {field}")
    return wrong


def compare(on: Ground, name: str, cell: Cell, rows: Workload) -> list[str]:
    """Play a cell on both, say the figures, return what disagrees."""
    both = {}
    for label in cell.policies:
        real, condition = asyncio.run(live(on, rows, label, f"{name}-{label}"))
        lab = virtual(on, rows, label)
        real, lab = (
            Figures(one.ttft_mean_s / on.slower, one.ttft_p99_s / on.slower, one.on_time)
            for one in (real, lab)
        )
        both[label] = real, lab
        said(
            f"| {name} | `{label}` | {real.ttft_mean_s:.3f} / {lab.ttft_mean_s:.3f} "
            f"| {apart(real.ttft_mean_s, lab.ttft_mean_s):.0%} "
            f"| {real.ttft_p99_s:.2f} / {lab.ttft_p99_s:.2f} "
            f"| {apart(real.ttft_p99_s, lab.ttft_p99_s):.0%} "
            f"| {real.on_time:.1%} / {lab.on_time:.1%} "
            f"| {apart(real.on_time, lab.on_time):.0%} | {condition} |"
        )
    return disagreements(name, both)


def said(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", default=list(CELLS), help=", ".join(CELLS))
    parser.add_argument("--engines", choices=("emulator", "vllm"), default="emulator")
    parser.add_argument("--endpoints", type=int, default=ENDPOINTS, help="fewer get fewer requests")
    parser.add_argument("--slower", type=float, default=5.0)
    parser.add_argument("--span", type=float, default=75.0, help="wall seconds of arrivals a run")
    words = parser.parse_args()
    profiles = ",".join(PROFILES)
    seats = ("--max-num-seqs", str(ENGINE.max_num_seqs))
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headgate-harness-") as made:
        scratch = Path(made)
        for label, settings in POLICIES.items():
            (scratch / f"{label}.toml").write_text(settings)
        if words.engines == "vllm":
            slow = ("--time-scale", str(1 / words.slower))
            fleet = servers(scratch / "fleet", words.endpoints, profiles, *seats, *slow)
        else:
            slow = ("--slowdown", str(words.slower), "--frontend-ms", "0")
            fleet = emulators(words.endpoints, profiles, *seats, *slow)
        with fleet as found:
            on = ground(found, slower=words.slower, scratch=scratch)
            said(f"Started in {time.monotonic() - began_at:.0f} s.\n{HEAD}")
            wrong = []
            for name in words.cells:
                rows = arrivals(
                    CELLS[name], endpoints=words.endpoints, slower=words.slower, span_s=words.span
                )
                wrong += compare(on, name, CELLS[name], rows)
    took = f"{time.monotonic() - began_at:.0f} s in all."
    said("\n".join(["", *(wrong or ["They agree."]), took]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
