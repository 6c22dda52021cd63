# ruff: noqa: T201 - a bench prints
"""What requests cost in Redis' memory: while they wait, and after they have ended.

    python tests/bench/memory.py [--waiting 10000] [--ended 1000]

`used_memory` before and after on an empty private server, divided by their number; the parts of docs/DEPLOYMENT.md's
formula. Those that wait are handed in without a dispatcher, those that end are answered by emulated GPUs.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dispatcher.client import Client
from dispatcher.local import Server

HEADGATE = Path(sys.executable).with_name("headgate")

SMALL, LARGE = 300, 4000
"Bytes of a prompt: within the entry, and above `limits.inline_bytes`."

OUTPUT_TOKENS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--ended", type=int, default=1000)
    said = parser.parse_args()
    asyncio.run(measure(said.waiting, said.ended))


async def measure(waiting: int, ended: int) -> None:
    print(f"{'':40} requests   bytes each")
    for size in (SMALL, LARGE):
        with tempfile.TemporaryDirectory() as directory, Server(directory=Path(directory)) as one:
            each, _ = await cost(one.url, waiting, size, is_awaited=False)
            print(f"{f'waiting, prompt of {size:,} bytes':40} {waiting:8,} {each:12,.0f}")
    for is_stream in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            each, answer = await with_system(directory, ended, is_stream=is_stream)
        what = f"ended, answer of {answer:,.0f} bytes" + (", streamed" if is_stream else "")
        print(f"{what:40} {ended:8,} {each:12,.0f}")


async def with_system(directory: str, count: int, *, is_stream: bool) -> tuple[float, float]:
    process = subprocess.Popen(  # noqa: ASYNC220  nothing else runs yet
        [
            *(HEADGATE, "up", "--emulate", "3", "--model", "m", "--json"),
            *("--directory", directory),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HOME": directory, "XDG_STATE_HOME": directory},
    )
    try:
        url = json.loads(process.stdout.readline())["redis"]
        await cost(url, 20, SMALL, is_awaited=True, is_stream=is_stream)  # what comes once
        return await cost(url, count, SMALL, is_awaited=True, is_stream=is_stream)
    finally:
        process.terminate()
        process.wait()


async def cost(
    url: str, count: int, size: int, *, is_awaited: bool, is_stream: bool = False
) -> tuple[float, float]:
    """Bytes of memory a request, and of an answer's body."""
    async with Client(redis=url) as client:
        before = (await client.connection.memory())["used_memory"]
        bodies = [
            {
                "model": "m",
                "prompt": f"{number:06d} ".ljust(size, "x"),
                "max_tokens": OUTPUT_TOKENS,
                "ignore_eos": True,
                "stream": is_stream,
            }
            for number in range(count)
        ]
        handles = await client.submit_many(bodies)
        answers = [len((await handle.record()).body) for handle in handles if is_awaited]
        after = (await client.connection.memory())["used_memory"]
    return (after - before) / count, sum(answers) / max(1, len(answers))


if __name__ == "__main__":
    main()
