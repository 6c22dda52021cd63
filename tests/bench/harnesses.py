"""Do the lab and the real system agree? `python tests/bench/harnesses.py [CELL...] [--time-scale X]`.

The same arrivals, profiles and policies twice: through the whole system (a private Redis, dispatcher, workers, emulated
engines over HTTP, each a process) by the clock, and through the lab in virtual time. They must rank policies alike and
lie within 10 % of each other. A minute of a public trace, played faster; about a minute and a half a run.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs

from dispatcher.client import Client
from dispatcher.demo import Demo
from dispatcher.stack import Stack, Wanted
from scheduler.settings import Settings
from scheduler.sim import policy, trace, workload
from scheduler.sim.fleet import CERTAIN, EndpointSpec, Fleet
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Promised

TRACE = Path(__file__).parents[1] / "vllm" / "azure23_conv_minute.jsonl"
"300 conversations; Azure Public Dataset, CC-BY-4.0."

POLICIES = {"plan": "urgency", "core-fcfs": "fcfs", "core-edf": "edf"}
"The lab's name of a policy, and the dispatcher's."

TIE = 0.03
"Shares on time closer than this are no rank."


class Cell(msgspec.Struct, frozen=True):
    """One small cell."""

    profiles: tuple[str, ...]
    faster: float
    "Times the trace's own 5 requests a second."
    promises: tuple[tuple[float | None, float | None], ...]
    "Seconds to the first token and a token, taken in turn."


CELLS = {
    "orders": Cell(("a30", "a30"), 1.5, ((0.7, None), (5.0, None))),
    "mixed": Cell(("a100", "a30"), 2.0, ((0.5, None),)),
    "pace": Cell(("a100",), 1.3, ((1.0, 0.04),)),
}
"Overload of promises of two lengths; endpoints of two speeds; a batch that must not grow."


class Figures(msgspec.Struct, frozen=True):
    """What both harnesses can say."""

    on_time: float
    ttft_mean_s: float
    tpot_mean_s: float


def arrivals(cell: Cell) -> tuple[workload.Arrival, ...]:
    with TRACE.open("rb") as file:
        rows = workload.scaled(trace.read(file, name=TRACE.name).arrivals, factor=cell.faster)
    promises = [cell.promises[at % len(cell.promises)] for at in range(len(rows))]
    return tuple(
        structs.replace(row, at_s=row.at_s - rows[0].at_s, ttft_s=ttft_s, tpot_s=tpot_s)
        for row, (ttft_s, tpot_s) in zip(rows, promises, strict=True)
    )


def virtual(cell: Cell, label: str) -> Figures:
    """In the lab, without chance: emulated engines have none either."""
    counts: dict[str, int] = {}
    for name in cell.profiles:
        counts[name] = counts.get(name, 0) + 1
    specs = tuple(EndpointSpec(profile=name, count=count) for name, count in counts.items())
    rows = arrivals(cell)
    stage = Lab(fleet=Fleet(name="small", endpoints=specs, chance=CERTAIN), work=Promised(rows))
    rate_rps = workload.rate(rows)
    found, _ = stage.run(policy.named(label), label=label, seed=0, rate_rps=rate_rps)
    assert found.ttft_mean_s is not None
    assert found.tpot_mean_s is not None
    return Figures(found.on_time, found.ttft_mean_s, found.tpot_mean_s)


async def live(cell: Cell, label: str, time_scale: float) -> Figures:
    """Through the whole system."""
    wanted = Wanted(profiles=cell.profiles, time_scale=time_scale)
    with tempfile.TemporaryDirectory(prefix="headgate-harness-") as scratch:
        config = Path(scratch) / "headgate.toml"
        config.write_text(f'[policy]\nname = "{POLICIES[label]}"\n')
        os.environ["HEADGATE_CONFIG"] = str(config)  # read by each process of the stack
        stack = Stack(Settings(), wanted, directory=Path(scratch), told=lambda _: None)
        async with stack, Client.from_settings(stack.settings, name="harness") as client:
            model = stack.running.models[0]
            play = Demo(client, arrivals(cell), model=model, time_scale=time_scale)
            report = await play.run()
    records = [record for record in play.records if record is not None]
    ttft = [one.ttft_s * time_scale for one in records if one.ttft_s is not None]
    tpot = [one.tpot_s * time_scale for one in records if one.tpot_s is not None]
    if not tpot:
        sys.exit(
            f"{label}: nobody was answered: {report.outcomes}, {report.unended} without an end"
        )
    on_time = sum(one.outcome == "completed" and one.on_time is not False for one in records)
    return Figures(on_time / len(play.records), float(np.mean(ttft)), float(np.mean(tpot)))


def agree(cell: str, both: dict[str, tuple[Figures, Figures]]) -> list[str]:
    """What is not as it should be: a figure further apart than 10 %, or two policies in another order."""
    wrong = []
    for label, (real, lab) in both.items():
        for field in Figures.__struct_fields__:
            seen, thought = getattr(real, field), getattr(lab, field)
            if abs(seen - thought) > 0.1 * max(seen, thought):
                wrong.append(f"{cell}, {label}: {field} {seen:.3f} live, {thought:.3f} in the lab")
    labels = list(both)
    for at, one in enumerate(labels):
        for other in labels[at + 1 :]:
            live_lead, lab_lead = (both[one][n].on_time - both[other][n].on_time for n in (0, 1))
            if min(abs(live_lead), abs(lab_lead)) > TIE and live_lead * lab_lead < 0:
                wrong.append(f"{cell}: {one} and {other} change places")
    return wrong


def said(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", default=list(CELLS), help=", ".join(CELLS))
    parser.add_argument("--time-scale", type=float, default=1.0)
    words = parser.parse_args()
    wrong = []
    said(
        "| cell | policy | on time, live / lab | mean TTFT, s | mean TPOT, ms |\n|---|---|---|---|---|"
    )
    for name in words.cells:
        both = {}
        for label in POLICIES:
            real = asyncio.run(live(CELLS[name], label, words.time_scale))
            both[label] = real, (lab := virtual(CELLS[name], label))
            said(
                f"| {name} | `{label}` | {real.on_time:.1%} / {lab.on_time:.1%} "
                f"| {real.ttft_mean_s:.3f} / {lab.ttft_mean_s:.3f} "
                f"| {real.tpot_mean_s * 1e3:.1f} / {lab.tpot_mean_s * 1e3:.1f} |"
            )
        wrong += agree(name, both)
    said("\n".join(wrong) or "They agree.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
