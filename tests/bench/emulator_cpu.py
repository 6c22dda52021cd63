"""CPU an emulated server needs for a token: `python tests/bench/emulator_cpu.py [BATCH [SCALE]]`.

A real vLLM streams at 75 us of CPU a token in a batch of 32, measured on two cores.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import aiohttp

TOKENS = 600


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def stream(session, url, tokens):
    body = {"prompt": [1] * 100, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    n_chunks = 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        async for data in response.content.iter_any():
            n_chunks += data.count(b"data: ")
    return n_chunks


async def measure(pid, url, batch):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await stream(session, url, 10)
        before, began = cpu_s(pid), time.perf_counter()
        chunks = await asyncio.gather(*(stream(session, url, TOKENS) for _ in range(batch)))
        used, took_s = cpu_s(pid) - before, time.perf_counter() - began
    n_tokens = batch * TOKENS
    sys.stdout.write(
        f"batch {batch}: {used / n_tokens * 1e6:.1f} us/token, {used / took_s:.3f} core, "
        f"{n_tokens / took_s:,.0f} tokens/s, {sum(chunks) / n_tokens:.2f} chunks/token\n"
    )


def main():
    batch, scale = (*sys.argv[1:], *("32", "1")[len(sys.argv) - 1 :])
    command = [sys.executable, "-m", "workers.emulator", "--profile", "h100"]
    with subprocess.Popen(
        [*command, "--time-scale", scale], stdout=subprocess.PIPE, text=True
    ) as server:
        url = json.loads(server.stdout.readline())["url"]
        try:
            asyncio.run(measure(server.pid, url, int(batch)))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
