"""Many requests through the real thing, and what stays behind: memory of dispatcher, worker and Redis on the way.

    python tests/bench/soak.py                    # 100,000 requests; --requests N

Dispatcher, worker and emulated engine as they are deployed, on a private Redis; what has ended is kept for seconds
in place of an hour, so that a plateau can be seen in minutes. Samples are taken at rest: nothing waits, nothing
runs, and the retention has passed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from throughput import HEADGATE, HERE, asked, cpu_s, rss_mb, running

from dispatcher.local import Server
from dispatcher.resp import Connection

RETENTION_S = 5.0
REST_S = 25.0
"After a sample's last request: the retention, then two rounds of upkeep, which cuts every 10 s."

SAMPLES = 4
WINDOW = 256
ENVIRON = {
    "HEADGATE_LOOP__RETENTION_S": str(RETENTION_S),
    "HEADGATE_WORKER__KEEP_S": str(RETENTION_S),
}


def sample(redis: Connection, pids: dict[str, int]) -> dict[str, float]:
    info = redis.call("INFO", "memory").decode().splitlines()
    said = dict(line.split(":", 1) for line in info if ":" in line)
    return {
        **{f"{name}_mb": rss_mb(pid) for name, pid in pids.items()},
        **{f"{name}_cpu_s": cpu_s(pid) for name, pid in pids.items()},
        "redis_used_mb": int(said["used_memory"]) / 2**20,
        "redis_keys": int(redis.call("DBSIZE")),
    }


def soak(requests: int) -> list[dict[str, float]]:
    parts = str(HERE / "parts.py")
    with tempfile.TemporaryDirectory() as directory, Server(directory=Path(directory)) as server:
        headgate = (HEADGATE, "--redis", server.url, "--pool", "bench")
        with (
            running(*headgate, "dispatcher", **ENVIRON) as (dispatcher, _),
            running(HEADGATE, "emulate", "--model", "m", "--time-scale", "1000") as (engine, up),
            running(*headgate, "worker", "--engine", f"e0={up['url']}", **ENVIRON) as (worker, _),
            running(sys.executable, parts, "asker", server.url, "bench") as (asker, _),
            Connection(server.url, timeout_s=10) as redis,
        ):
            pids = {"dispatcher": dispatcher.pid, "worker": worker.pid, "engine": engine.pid}
            asked(asker, requests=1000, window=WINDOW)
            found = []
            for done in range(0, requests + 1, requests // SAMPLES):
                if done:
                    asked(asker, requests=requests // SAMPLES, window=WINDOW)
                time.sleep(REST_S)
                found.append({"requests": done, **sample(redis, pids)})
            return found


def table(found: list[dict[str, float]]) -> Table:
    shown = Table(title="Memory at rest, MB", title_justify="left")
    names = ("dispatcher_mb", "worker_mb", "redis_used_mb", "redis_keys")
    for title in ("requests", "dispatcher RSS", "worker RSS", "Redis used", "Redis keys"):
        shown.add_column(title, justify="right")
    for one in found:
        shown.add_row(f"{one['requests']:,}", *(f"{one[name]:,.1f}" for name in names))
    return shown


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--requests", type=int, default=100_000)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found = soak(given.requests)
    Console(width=100).print(table(found))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
