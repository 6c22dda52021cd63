"""The virtual endpoint and the emulated server are the same engine: one in the lab, one behind HTTP.

The server and its clients share one process and a clock that jumps, so what differs is never the machine's doing.
Seen with `pytest -s tests/sim/test_agrees.py`: the table goes to stdout.
"""

import asyncio
import sys
from pathlib import Path

import aiohttp
import numpy as np
from jumping import JumpingLoop
from msgspec import structs

from scheduler.sim import body, policy, trace, workload
from scheduler.sim.fate import Fate
from scheduler.sim.fleet import CERTAIN, NO_DELAYS, EndpointSpec, Fleet
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Promised
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings

TRACE = Path(__file__).parents[1] / "vllm" / "azure23_conv_minute.jsonl"
"Conversations; Azure Public Dataset, CC-BY-4.0."

PROFILE = "a100"

FASTER = 1.5
"7.5 requests a second, a little more than the endpoint can carry: queues form, and tokens slow each other down."

SPAN_S = 30.0

PROMISES = {"loose": (2.0, 0.080), "middle": (1.0, 0.060), "tight": (0.5, 0.055)}
"Seconds to the first token, and a token: kept by nearly all, by most, by half."

AGREED = 0.02


def arrivals():
    with TRACE.open("rb") as file:
        rows = trace.read(file, name=TRACE.name).arrivals
    return workload.sliced(workload.scaled(rows, factor=FASTER), 0.0, SPAN_S)


def virtual(rows):
    """In virtual time: what became of each."""
    spec = EndpointSpec(profile=PROFILE)
    alone = Fleet(name="one", endpoints=(spec,), chance=CERTAIN, delays=NO_DELAYS)
    stage = Lab(fleet=alone, work=Promised(rows), trace="minute")
    rate_rps = workload.rate(rows)
    return stage.run(policy.named("round-robin"), label="", seed=0, rate_rps=rate_rps)[1].fates


async def over_http(rows):
    """Each on a stream of its own."""
    settings = EmulatorSettings(profile=PROFILE, model="m")
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        Emulator(settings) as emulator,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        began_at = asyncio.get_running_loop().time()
        asked = [
            _asked(session, emulator.url, Fate(at, row), body.body(row, "m", row=at), began_at)
            for at, row in enumerate(rows)
        ]
        return await asyncio.gather(*asked)


async def _asked(session, url, fate, raw, began_at):
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(began_at + fate.arrival.at_s - clock())
    fate.enqueued_at = clock()
    headers = {"content-type": "application/json"}
    async with session.post(url + "/v1/completions", data=raw, headers=headers) as response:
        async for line in response.content:
            if line.startswith(b"data: {") and b'"text": ""' not in line:
                fate.first_token_at = fate.first_token_at or clock()
                fate.finished_at = clock()
    fate.output_tokens = fate.arrival.output_tokens
    fate.end = "completed"
    return fate


def attainment(fates, ttft_s, tpot_s):
    """The share that keeps these promises."""
    return np.mean([fate.ttft_s <= ttft_s and (fate.tpot_s or 0.0) <= tpot_s for fate in fates])


def test_http_and_virtual_time_agree():
    """Same coefficients, same arrivals, no chance: attainment within 2 points."""
    rows = tuple(structs.replace(row, at_s=row.at_s + 0.2) for row in arrivals())
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        seen = runner.run(over_http(rows))
    thought = virtual(rows)

    found = {}
    for name, promise in PROMISES.items():
        found[name] = attainment(seen, *promise), attainment(thought, *promise)
        sys.stdout.write(f"{name}: over HTTP {found[name][0]:.1%}, virtual {found[name][1]:.1%}\n")
    for what in ("ttft_s", "tpot_s"):
        means = [np.mean([getattr(f, what) or 0.0 for f in fates]) for fates in (seen, thought)]
        sys.stdout.write(f"mean {what}: over HTTP {means[0]:.4f}, virtual {means[1]:.4f}\n")
    assert len(seen) == len(thought) > 200
    for name in PROMISES:
        assert abs(found[name][0] - found[name][1]) <= AGREED, found
