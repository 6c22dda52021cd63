"""A minute of a real trace on real vLLM servers and on the emulator, with the same coefficients: do they agree?

Seen with `pytest -s tests/vllm/test_replay.py`: the table goes to stdout.
"""

import asyncio
from pathlib import Path

import pytest
from fleets import emulators, first_token_s, servers

from dispatcher.client import Client
from dispatcher.demo import Demo
from dispatcher.stack import Engine as Place
from dispatcher.stack import Stack, Wanted
from scheduler.settings import Settings
from scheduler.sim import trace
from scheduler.sim.workload import Promise, promised

pytestmark = pytest.mark.timeout(600)

TRACE = Path(__file__).with_name("azure23_conv_minute.jsonl")
"Conversations, 300 requests; Azure Public Dataset, CC-BY-4.0."

PROFILES = "a30,v100"
COUNT = 4
"Together they carry about 7 requests a second of this trace, which brings 5."

SEATS = 32
VOCABULARY = 8000
"Of the fleet's small model; prompts are token ids, whose number both engines see alike."

PROMISES = {"loose": (1.0, 0.100), "middle": (0.5, 0.070), "tight": (0.25, 0.055)}
"Seconds to the first token, and a token."

AGREED = 0.05
"Difference of attainment that counts as none."


async def played(endpoints, arrivals, directory):
    """Every record, in the order of the trace."""
    wanted = Wanted(
        engines=tuple(
            Place(
                name=one["name"],
                url=one["url"],
                hardware=one["hardware"],
                more=f"max_num_seqs={SEATS},by_priority=true",
            )
            for one in endpoints
        )
    )
    async with (
        Stack(Settings(), wanted, directory=directory, told=print) as stack,
        Client.from_settings(stack.settings, name="replay") as client,
    ):
        play = Demo(client, arrivals, model="emulated", time_scale=1.0, vocabulary=VOCABULARY)
        report = await play.run()
    assert report.unended == 0
    return report, play.records


def attainment(records, ttft_s, tpot_s):
    """Share of all requests whose first token and whose mean gap were in time."""
    kept = [
        record is not None
        and record.outcome == "completed"
        and record.ttft_s <= ttft_s
        and (record.tpot_s or 0.0) <= tpot_s
        for record in records
    ]
    return sum(kept) / len(kept)


def test_real_servers_and_the_emulator_keep_the_same_promises(fleet_home, tmp_path):
    """Attainment differs by no more than a few points, and nothing is lost on either."""
    with TRACE.open("rb") as file:
        rows = trace.read(file, name=TRACE.name).arrivals
    ttft_s, tpot_s = PROMISES["middle"]
    arrivals = promised(rows, Promise(ttft_s=ttft_s, tpot_s=tpot_s))

    seats = ("--max-num-seqs", str(SEATS))
    with servers(fleet_home, COUNT, PROFILES, *seats) as endpoints:
        own_s = asyncio.run(first_token_s(endpoints[0]["url"]))
        real, real_records = asyncio.run(played(endpoints, arrivals, tmp_path / "real"))
    # Both are asked alike, so what differs is what a real server's front end takes on this machine; the profile has
    # the figure of its GPU's own server.
    with emulators(1, PROFILES, "--frontend-ms", "0") as endpoints:
        ours_s = asyncio.run(first_token_s(endpoints[0]["url"]))
    frontend_ms = max(0.0, 1e3 * (own_s - ours_s))
    front = ("--frontend-ms", f"{frontend_ms:.1f}")
    with emulators(COUNT, PROFILES, *seats, *front) as endpoints:
        emulated, emulated_records = asyncio.run(played(endpoints, arrivals, tmp_path / "emulated"))

    differences = {}
    table = ["", f"front end: {frontend_ms:.1f} ms", f"{'':24}{'emulator':>12}{'real vLLM':>12}"]
    for name, (ttft_s, tpot_s) in PROMISES.items():
        both = [attainment(records, ttft_s, tpot_s) for records in (emulated_records, real_records)]
        differences[name] = abs(both[0] - both[1])
        label = f"{name}: {ttft_s:g} s, {1e3 * tpot_s:g} ms"
        table.append(f"{label:24}{both[0]:12.1%}{both[1]:12.1%}")
    for what in ("ttft", "tpot"):
        for share in ("mean", "p50", "p90", "p99"):
            pair = [getattr(getattr(report, what), share) for report in (emulated, real)]
            table.append(f"{what + ' ' + share:24}{pair[0]:11.3f}s{pair[1]:11.3f}s")
    print("\n".join(table))  # noqa: T201  the figures are what it is for
    assert max(differences.values()) <= AGREED, differences
