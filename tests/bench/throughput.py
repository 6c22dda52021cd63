"""What one request costs the dispatcher, Redis and whoever asks, and how many a second go through.

    python tests/bench/throughput.py                    # the tables; --json FILE for the figures
    python tests/bench/throughput.py --requests 5000 --passes 1 --endpoints 16

A dispatcher, a private Redis, endpoints that answer at once and one asker, each a process of its own on this machine.
CPU is the processes' own (/proc), counts are the server's (INFO), so that both hold on a busy machine; rates and
waits are wall clock and say what the machine had left. Medians of the passes. Nothing is asserted.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import peers
from rich.console import Console
from rich.table import Table

from dispatcher.local import Server
from dispatcher.resp import Connection

HERE = Path(__file__).parent
HEADGATE = str(Path(sys.executable).with_name("headgate"))
TICKS = os.sysconf("SC_CLK_TCK")

WARM = 1000
"Requests before anything is measured: first plans, first rewards, Redis' first pages."

WINDOW = 1024
"Unanswered requests at once: more than a turn takes, far less than a backlog."

CALM_RATE = 200
"Requests a second where waits are measured: the rate of the peers' published figures."


def cpu_s(pid: int) -> float:
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / TICKS


def rss_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024


def metrics(port: int, **wanted: str) -> dict[str, float]:
    """These series of a process's /metrics, under names of one's own; 0 where there is none yet."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = {
        name: re.search(rf"^{series}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        for name, series in wanted.items()
    }
    return {name: float(match[1]) if match else 0.0 for name, match in found.items()}


@contextlib.contextmanager
def running(*words: str, **environ: str):
    """A process that says a line of JSON when it is ready; the process and that line."""
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | environ,
    )  # fmt: skip
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.terminate()
        if process.wait(20) not in (0, -15):
            raise RuntimeError(f"{words} ended with {process.returncode}")


def asked(process: subprocess.Popen[str], **wanted) -> dict[str, object]:
    process.stdin.write(json.dumps(wanted) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


class System:
    """All that runs, and what it has spent so far."""

    def __init__(self, redis, server_pid: int, dispatcher, port: int, players) -> None:
        self.redis = redis
        self.port = port
        self.pids = {"dispatcher": dispatcher.pid, "server": server_pid, "endpoints": players.pid}

    def spent(self) -> dict[str, float]:
        return {
            **{f"{name}_us": cpu_s(pid) * 1e6 for name, pid in self.pids.items()},
            **self.turned(),
            **self.commands(),
            "at": time.perf_counter(),
        }

    def turned(self) -> dict[str, float]:
        found = metrics(
            self.port,
            turns="headgate_turns_total",
            round_trips="headgate_redis_round_trips_total",
            decide_us="headgate_decide_seconds_sum",
        )
        return found | {"decide_us": found["decide_us"] * 1e6}

    def commands(self) -> dict[str, float]:
        said = self.redis.call("INFO", "commandstats").decode()
        counts = re.findall(r"cmdstat_([^:]+):calls=(\d+)", said)
        return {f"cmd {name}": float(calls) for name, calls in counts}

    def used_mb(self) -> float:
        said = self.redis.call("INFO", "memory").decode()
        return int(re.search(r"used_memory:(\d+)", said)[1]) / 2**20


@contextlib.contextmanager
def system(endpoints: int, **environ: str):
    with (
        tempfile.TemporaryDirectory() as directory,
        Server(directory=Path(directory)) as server,
        running(HEADGATE, "--redis", server.url, "--pool", "bench", "dispatcher", **environ) as (
            dispatcher,
            ready,
        ),
        running(
            sys.executable, str(HERE / "parts.py"), "endpoints", server.url, "bench", str(endpoints)
        ) as (players, _),
        running(sys.executable, str(HERE / "parts.py"), "asker", server.url, "bench") as (asker, _),
        Connection(server.url, timeout_s=10) as redis,
    ):
        yield System(redis, server.pid, dispatcher, ready["metrics_port"], players), players, asker


def saturated(one: System, players, asker, requests: int) -> dict[str, float]:
    """As many as go through: what each costs."""
    asked(players)
    before = one.spent()
    answer = asked(asker, requests=requests, window=WINDOW)
    after = one.spent()
    spent = {name: (after[name] - before.get(name, 0)) / requests for name in after}
    jobs = asked(players)["waited_ms"]
    calls = {name: n for name, n in spent.items() if name.startswith("cmd ") and n > 0.0005}
    return {
        "rate": requests / answer["took_s"],
        "dispatcher_us": spent["dispatcher_us"],
        "decide_us": spent["decide_us"],
        "server_us": spent["server_us"],
        "asker_us": answer["cpu_s"] / requests * 1e6,
        "endpoints_us": spent["endpoints_us"],
        "a_core": 1e6 / spent["dispatcher_us"],
        "turn_requests": 1 / spent["turns"],
        "round_trips": spent["round_trips"],
        "commands": sum(calls.values()),
        "fcalls": spent.get("cmd fcall", 0),
        **quantiled("job", jobs),
        **quantiled("result", answer["waited_ms"]),
        **calls,
    }


def calm(players, asker, requests: int) -> dict[str, float]:
    """At a rate far below what goes through: how long each waits."""
    asked(players)
    answer = asked(asker, requests=requests, rate=CALM_RATE)
    return {
        **quantiled("job", asked(players)["waited_ms"]),
        **quantiled("result", answer["waited_ms"]),
    }


def alone(players, asker, requests: int) -> dict[str, float]:
    """One request at a time."""
    asked(players)
    answer = asked(asker, requests=requests, window=1)
    return {
        **quantiled("job", asked(players)["waited_ms"]),
        **quantiled("result", answer["waited_ms"]),
    }


def quantiled(name: str, values) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {f"{name}_p50_ms": cuts[49], f"{name}_p99_ms": cuts[98]}


def medians(passes) -> dict[str, float]:
    names = [name for name in passes[0] if all(name in one for one in passes)]
    return {name: statistics.median(one[name] for one in passes) for name in names}


def cost_table(found: dict[int, dict[str, float]]) -> Table:
    table = Table(title="One request, many in flight", title_justify="left")
    table.add_column("a request")
    for endpoints in found:
        table.add_column(f"{endpoints} endpoints", justify="right")
    rows = (
        ("dispatcher CPU, us", "dispatcher_us", "{:.0f}"),
        ("  of it deciding (wall), us", "decide_us", "{:.0f}"),
        ("requests/s on one core of dispatcher", "a_core", "{:,.0f}"),
        ("Redis CPU, us", "server_us", "{:.0f}"),
        ("asker's CPU, us", "asker_us", "{:.0f}"),
        ("endpoints' CPU, us", "endpoints_us", "{:.0f}"),
        ("requests in one turn", "turn_requests", "{:.1f}"),
        ("dispatcher's round trips", "round_trips", "{:.4f}"),
        ("function calls, all parties", "fcalls", "{:.2f}"),
        ("commands run, also inside functions", "commands", "{:.1f}"),
        ("rate here, requests/s", "rate", "{:,.0f}"),
        ("enqueue to job, p50 ms", "job_p50_ms", "{:.2f}"),
        ("enqueue to result, p50 ms", "result_p50_ms", "{:.2f}"),
    )
    for title, name, form in rows:
        table.add_row(title, *(form.format(one[name]) for one in found.values()))
    return table


def wait_table(found: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Waits, ms", title_justify="left")
    for column in ("", "to job p50", "p99", "to result p50", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name, one in found.items():
        names = ("job_p50_ms", "job_p99_ms", "result_p50_ms", "result_p99_ms")
        table.add_row(name, *(f"{one[key]:.2f}" for key in names))
    return table


def idle(endpoints: int, for_s: float) -> dict[str, float]:
    """Cores that the dispatcher and Redis take while nothing but beats comes."""
    with system(endpoints) as (one, _, _):
        time.sleep(2)
        before = one.spent()
        time.sleep(for_s)
        after = one.spent()
        wall_us = (after["at"] - before["at"]) * 1e6
        return {
            name: (after[f"{name}_us"] - before[f"{name}_us"]) / wall_us
            for name in ("dispatcher", "server")
        }


def takeover(pending: int) -> dict[str, float]:
    """How long a new leader reads back what a dead one had read, and what it weighs then."""
    with tempfile.TemporaryDirectory() as directory, Server(directory=Path(directory)) as server:
        parts = str(HERE / "parts.py")
        with running(sys.executable, parts, "gone", server.url, "bench", str(pending)):
            pass
        headgate = (HEADGATE, "--redis", server.url, "--pool", "bench", "dispatcher")
        with running(*headgate) as (dispatcher, ready):
            began_at, before_mb = time.perf_counter(), rss_mb(dispatcher.pid)
            while not metrics(ready["metrics_port"], leads="headgate_is_leader")["leads"]:
                time.sleep(0.02)
            return {
                "pending": pending,
                "took_s": time.perf_counter() - began_at,
                "cpu_s": cpu_s(dispatcher.pid),
                "before_mb": before_mb,
                "after_mb": rss_mb(dispatcher.pid),
            }


def peer_table(ours: float, found: dict[str, dict[str, object]]) -> Table:
    table = Table(
        title="Beside us: tasks that do nothing, one worker process", title_justify="left"
    )
    for column in ("", "version", "tasks/s here", "we, times that"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("headgate, 16 endpoints", "", f"{ours:,.0f}", "1.0")
    for name, one in found.items():
        if "error" in one:
            table.add_row(name, str(one["error"]), "", "")
        else:
            row = (str(one["version"]), f"{one['rate']:,.0f}", f"{ours / one['rate']:.1f}")
            table.add_row(name, *row)
    return table


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--requests", type=int, default=10_000, help="in one pass")
    options.add_argument("--passes", type=int, default=3)
    options.add_argument("--endpoints", type=int, nargs="+", default=[4, 16, 64])
    options.add_argument("--idle-s", type=float, default=10)
    options.add_argument(
        "--pending", type=int, default=100_000, help="at a takeover; 0: leave it out"
    )
    options.add_argument(
        "--peers", action="store_true", help="streaQ, taskiq-redis, saq and arq as well"
    )
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    console = Console(width=110)
    found: dict[str, object] = {"cost": {}, "waits": {}}
    for endpoints in given.endpoints:
        with system(endpoints) as (one, players, asker):
            asked(asker, requests=WARM, window=WINDOW)
            passes = [saturated(one, players, asker, given.requests) for _ in range(given.passes)]
            found["cost"][endpoints] = medians(passes)
            if endpoints == 16:
                waits = [calm(players, asker, 1000) for _ in range(given.passes)]
                found["waits"][f"{CALM_RATE}/s"] = medians(waits)
                waits = [alone(players, asker, 1000) for _ in range(given.passes)]
                found["waits"]["one at a time"] = medians(waits)
    console.print(cost_table(found["cost"]))
    if found["waits"]:
        console.print(wait_table(found["waits"]))
    if given.idle_s:
        found["idle"] = idle(100, given.idle_s)
        cores = found["idle"]
        console.print(
            f"idle with 100 endpoints: dispatcher {cores['dispatcher']:.3f}, Redis {cores['server']:.3f} core"
        )
    if given.pending:
        found["takeover"] = one = takeover(given.pending)
        console.print(
            f"takeover with {given.pending:,} pending: {one['took_s']:.1f} s, "
            f"{one['before_mb']:.0f} -> {one['after_mb']:.0f} MB"
        )
    if given.peers and 16 in found["cost"]:
        found["peers"] = peers.rates(3000, given.passes)
        console.print(peer_table(found["cost"][16]["rate"], found["peers"]))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
