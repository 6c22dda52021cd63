"""CPU a streamed token costs the worker: `python tests/bench/worker_cpu.py [--quiet] [--n 64] [--tokens 300]`.

Real Redis, emulated engine and worker as processes of their own; the worker's user and system time from /proc.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hand import Hand, until

from dispatcher.local import Server

HEADGATE = str(Path(sys.executable).with_name("headgate"))


def cpu_s(pid: int) -> float:
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, n: int, n_tokens: int, *, is_streamed: bool) -> None:
    engine = subprocess.Popen(  # noqa: ASYNC220
        [HEADGATE, "emulate", "--profile", "a100", "--max-num-seqs", "256"], stdout=subprocess.PIPE
    )
    engine_url = json.loads(engine.stdout.readline())["url"]
    worker = subprocess.Popen(  # noqa: ASYNC220
        [HEADGATE, "--redis", url, "--pool", "bench", "worker", "--engine", f"e0={engine_url}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        hand = await Hand.of(url, "bench")
        beat = await hand.ready()
        before, engine_before, at = cpu_s(worker.pid), cpu_s(engine.pid), time.perf_counter()
        for number in range(n):
            body = {
                "messages": [{"role": "user", "content": f"story {number}"}],
                "max_tokens": n_tokens,
                "vllm_xargs": {"output_tokens": n_tokens},
            }
            await hand.submit(f"r{number}", body, beat.epoch, stream=is_streamed)
        await until(lambda: _count(hand, n))
        spent, engine_spent = cpu_s(worker.pid) - before, cpu_s(engine.pid) - engine_before
        wall_s = time.perf_counter() - at
        tokens = n * n_tokens
        print(  # noqa: T201
            f"{'streamed' if is_streamed else 'quiet'}: {tokens} tokens of {n} requests in {wall_s:.1f} s; "
            f"worker {spent / tokens * 1e6:.0f} us a token ({spent / wall_s:.2f} core), "
            f"engine {engine_spent / tokens * 1e6:.0f} us a token"
        )
        await hand.redis.close()
    finally:
        worker.terminate()
        engine.terminate()
        worker.wait()
        engine.wait()


async def _count(hand: Hand, n: int) -> bool:
    await asyncio.sleep(0.2)
    return int(await hand.redis.command("XLEN", hand.keys.results)) >= n


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--n", type=int, default=64)
    options.add_argument("--tokens", type=int, default=300)
    options.add_argument("--quiet", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, Server(directory=Path(directory)) as server:
        asyncio.run(measure(server.url, given.n, given.tokens, is_streamed=not given.quiet))


if __name__ == "__main__":
    main()
