# ruff: noqa: T201 - a bench prints
"""What the way through the door adds at one client: door, Redis, dispatcher, worker and back, against the engine itself.

    python tests/bench/latency.py [--requests 300] [--time-scale 1000] [--pause-ms 0]

The engine is emulated and so fast that it costs nothing but its HTTP. It and the door are asked by aiohttp; `posts` asks
the engine as a worker does, which shows what of the engine's own is that client's. All ways are asked in turn, so that a
noisy neighbour disturbs all, each request as soon as the one before is answered. `--pause-ms` rests before each: then what
follows an answer is over, and all code is cold. Printed: the 5th, 50th and 95th percentile of each way in milliseconds,
what it adds to the engine's own, the stages between the moments that the rewards keep, and what a request costs whoever
else is busy: the CPU of every process and the commands of Redis. On a busy machine the 5th percentile is the one to
compare.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import aiohttp
import msgspec
import uvloop

from dispatcher.client import Client
from scheduler import codec
from scheduler.wire.worker import Reward
from workers.posts import Posts

HEADGATE = Path(sys.executable).with_name("headgate")

WARM = 30
"Requests before the first that counts: connections, caches, the predictor's first steps."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--time-scale", type=float, default=1000.0)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headgate-latency-") as directory:
        process = subprocess.Popen(
            [
                *(HEADGATE, "up", "--emulate", "1", "--model", "m", "--json"),
                *("--time-scale", str(said.time_scale), "--directory", directory),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HOME": directory, "XDG_STATE_HOME": directory},
        )
        try:
            uvloop.run(
                compare(json.loads(process.stdout.readline()), said.requests, said.pause_ms / 1e3)
            )
        finally:
            process.terminate()
            process.wait()


async def compare(up, requests: int, pause_s: float) -> None:
    ways = {"engine": up["endpoints"][0]["url"], "door": up["door"]}
    named = up["pids"] | {"client": os.getpid()}
    posts = Posts(ways["engine"], {"Content-Type": "application/json"}, connect_s=5.0)
    async with aiohttp.ClientSession() as session, Client(redis=up["redis"]) as client:
        for is_stream in (False, True):
            taken = {name: [] for name in (*ways, "posts", "client")}
            for number in range(WARM + requests):
                for name, url in ways.items():
                    await asyncio.sleep(pause_s)
                    taken[name].append(await http(session, url, is_stream=is_stream))
                await asyncio.sleep(pause_s)
                taken["posts"].append(await post(posts, is_stream=is_stream))
                await asyncio.sleep(pause_s)
                taken["client"].append(await library(client, is_stream=is_stream, number=number))
            show("stream, to its first token" if is_stream else "whole", taken)
        await stages(client, requests)
        for way in ("engine", "door", "idle"):
            before = {name: cpu_s(pid) for name, pid in named.items()}
            asked = await commands(client)
            for _ in range(requests):
                if way == "idle":
                    await asyncio.sleep(0.005)
                else:
                    await http(session, ways[way], is_stream=False)
            spent = {name: (cpu_s(pid) - before[name]) / requests for name, pid in named.items()}
            shown = "  ".join(f"{name} {s * 1e3:.2f}" for name, s in spent.items())
            print(f"\nCPU, ms a request ({way}, whole): {shown}")
            more = (await commands(client)) - asked
            shown = "  ".join(f"{name} {n / requests:.2f}" for name, n in more.most_common(12))
            print(f"Redis' commands a request: {shown}")
    posts.close()


async def commands(client: Client) -> Counter[str]:
    """How often each command, and each of our functions' own, has been called."""
    stats = await client.connection.command("INFO", "commandstats")
    return Counter({name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()})


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def body(*, is_stream: bool):
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "why is the sky blue?"}],
        "max_tokens": 2 if is_stream else 1,
        "stream": is_stream,
    }


async def http(session, url: str, *, is_stream: bool) -> float:
    began_at = perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=body(is_stream=is_stream)) as answer:
        assert answer.status == 200, await answer.text()
        first = await answer.content.readany() if is_stream else await answer.read()
        took_s = perf_counter() - began_at
        assert first
        await answer.read()
    return took_s


async def post(posts: Posts, *, is_stream: bool) -> float:
    began_at = perf_counter()
    heard_at = []
    asked = ("/v1/chat/completions", msgspec.json.encode(body(is_stream=is_stream)), {})
    status, _ = await posts.send(*asked, lambda _: heard_at.append(perf_counter()))
    assert status == 200
    return (heard_at[0] if is_stream else perf_counter()) - began_at


async def library(client: Client, *, is_stream: bool, number: int) -> float:
    began_at = perf_counter()
    handle = await client.submit(body(is_stream=is_stream))
    if is_stream:
        await anext(aiter(handle))
    else:
        await handle
    took_s = perf_counter() - began_at
    await handle.record()
    return took_s


def show(what: str, taken) -> None:
    print(f"\n{what + ', ms':28}      p5     p50     p95   added at p5, p50")
    at = {name: percentiles(times[WARM:]) for name, times in taken.items()}
    for name, (p5, p50, p95) in at.items():
        added = f"{p5 - at['engine'][0]:+8.3f} {p50 - at['engine'][1]:+8.3f}"
        print(f"  {name:26} {p5:7.3f} {p50:7.3f} {p95:7.3f}   {added}")


def percentiles(times) -> tuple[float, float, float]:
    """The 5th, 50th and 95th, in milliseconds."""
    parts = quantiles(times, n=20)
    return parts[0] * 1e3, median(times) * 1e3, parts[-1] * 1e3


async def stages(client: Client, requests: int) -> None:
    """Medians between the moments that the rewards of the client's own requests name."""
    rewards = await client.connection.newest(client.keys.rewards, after="0", count=requests)
    found = [codec.decode(Reward, fields) for _, fields in rewards]
    moments = (
        "enqueued_at",
        "decided_at",
        "pulled_at",
        "admitted_at",
        "first_token_at",
        "finished_at",
    )
    print("\nby stage, ms (moments in Redis are whole milliseconds; medians)")
    for before, after in pairwise(moments):
        gaps = [
            getattr(r, after) - getattr(r, before)
            for r in found
            if getattr(r, after) is not None and getattr(r, before) is not None
        ]
        print(f"  {before[:-3]:12} -> {after[:-3]:12} {median(gaps) * 1e3:8.3f}")


if __name__ == "__main__":
    main()
