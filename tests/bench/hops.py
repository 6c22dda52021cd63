# ruff: noqa: T201 - a bench prints
"""Where the time to the first byte goes: one streamed request at a time through the door, hop by hop.

    python tests/bench/hops.py [--requests 200]

Every process notes the moments at which it enters the places in `HOPS` (stamps/sitecustomize.py); printed are the
medians between each and the one before. What lies between two processes holds the kernel, the server and the waking of
the next one. The last lines set it beside the engine asked directly, and beside the floor: one XADD in one process to
the blocked XREAD of another, with nothing decided or remembered. On a busy machine `chrt -r 1` before it, as root, shows
what the work itself takes.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import aiohttp
import uvloop

from dispatcher.streams.connection import Connection, Where

HEADGATE = Path(sys.executable).with_name("headgate")
STAMPS = Path(__file__).with_name("stamps")
WARM = 30
PAUSE_S = 0.005
"Between two requests, so that what follows an answer is over."

HOPS = (
    "client: posts",
    "door: request",
    "calls submit",
    "dispatcher: turn",
    "calls assign",
    "worker: job",
    "worker: posts",
    "engine: request",
    "engine: writes",
    "worker: token",
    "calls tokens",
    "door: token",
    "door: writes",
    "client: first byte",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--echo", metavar="URL", help="be the other end of the floor")
    said = parser.parse_args()
    if said.echo:
        uvloop.run(echo(said.echo))
        return
    with tempfile.TemporaryDirectory(prefix="headgate-hops-") as directory:
        stamps = Path(directory, "stamps")
        stamps.mkdir()
        more = {"HOME": directory, "XDG_STATE_HOME": directory}
        paths = [str(STAMPS), *filter(None, [os.environ.get("PYTHONPATH")])]
        more |= {"HEADGATE_STAMPS": str(stamps), "PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen(
            [
                *(HEADGATE, "up", "--emulate", "1", "--model", "m", "--json"),
                *("--time-scale", "1000", "--directory", directory),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | more,
        )
        try:
            up = json.loads(process.stdout.readline())
            asked = uvloop.run(ask(up, said.requests))
            hop_s = uvloop.run(floor(up["redis"], said.requests))
        finally:
            process.terminate()
            process.wait()
        show(asked, moments(stamps))
        print(f"one bare hop through Redis         {hop_s * 1e6:7,.0f} us, three of them the floor")


async def ask(up, requests: int):
    """When each was posted, and when its first byte came, by way."""
    asked = defaultdict(list)
    ways = {"door": up["door"], "engine": up["endpoints"][0]["url"]}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "why is the sky blue?"}],
        "max_tokens": 2,
        "stream": True,
    }
    async with aiohttp.ClientSession() as session:
        for number in range(WARM + requests):
            for way, url in ways.items():
                await asyncio.sleep(PAUSE_S)
                began_at = perf_counter()
                async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.content.readany()
                    first_at = perf_counter()
                    await answer.read()
                if number >= WARM:
                    asked[way].append((began_at, first_at))
    return asked


async def floor(url: str, count: int) -> float:
    """Half the median of a ping through one stream and its pong through another."""
    redis = await Connection.connect(Where(url=url))
    other = await asyncio.create_subprocess_exec(sys.executable, __file__, "--echo", url)
    took, after = [], "0-0"
    try:
        for _ in range(WARM + count):
            await asyncio.sleep(PAUSE_S)
            began_at = perf_counter()
            _, came = await asyncio.gather(
                said(redis, "ping"), redis.read({"pong": after}, count=1, block_s=10)
            )
            took.append(perf_counter() - began_at)
            after = came["pong"][-1][0]
    finally:
        other.kill()
        await other.wait()
        await redis.close()
    return median(took[WARM:]) / 2


async def echo(url: str) -> None:
    redis, after = await Connection.connect(Where(url=url)), "0-0"
    while True:
        came = await redis.read({"ping": after}, count=1, block_s=10)
        for entry, _ in came.get("ping", ()):
            after = entry
            await said(redis, "pong")


async def said(redis: Connection, stream: str) -> None:
    """An entry by the quickest way there is, that of the functions."""
    await redis._calls.ask([("XADD", stream, "*", "a", "b")], limit_s=5)


def moments(directory: Path):
    """By name, in order."""
    found = defaultdict(list)
    for file in directory.iterdir():
        for line in file.read_text().splitlines():
            at, _, name = line.partition(" ")
            found[name].append(float(at))
    return {name: sorted(times) for name, times in found.items()}


def show(asked, found) -> None:
    gaps = defaultdict(list)
    for began_at, first_at in asked["door"]:
        times = {HOPS[0]: began_at, HOPS[-1]: first_at}
        for name in HOPS[1:-1]:
            at = bisect_left(found[name], began_at)
            times[name] = found[name][at] if at < len(found[name]) else float("nan")
        for before, after in pairwise(HOPS):
            gaps[before, after].append(times[after] - times[before])
    for (before, after), taken in gaps.items():
        print(f"{before:20} -> {after:20} {median(taken) * 1e6:7,.0f} us")
    took = {way: median(end - begin for begin, end in rows) for way, rows in asked.items()}
    inside = median(gaps["engine: request", "engine: writes"])
    print(f"\nto the first byte through the door {took['door'] * 1e6:7,.0f} us")
    print(
        f"of the engine itself              {took['engine'] * 1e6:7,.0f} us, inside it {inside * 1e6:,.0f}"
    )
    print(f"added                             {(took['door'] - took['engine']) * 1e6:7,.0f} us")


if __name__ == "__main__":
    main()
