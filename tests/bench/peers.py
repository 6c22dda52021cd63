"""The same machine's no-op rates of others: streaQ, taskiq-redis, saq and arq, each in a venv of its own.

    python tests/bench/peers.py            # made by throughput.py --peers

Venvs are made on demand under `.bench/` and kept: their pins contradict each other. Each peer runs one worker
process whose task does nothing, on its own empty private Redis, and stores its results where it can; one process
enqueues and then counts to the last. Rate: from the first enqueue to the last task's end.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dispatcher.local import Server

VENVS = Path(__file__).parents[2] / ".bench"

INSTALL_S = 300
"The longest that one peer's installation may take; then the table says so instead of its rate."

COUNT = """
done = 0
async def count(client):
    global done
    done += 1
    if done % 50 == 0:
        await client.incr("done")
"""
"What every peer's task does: count, and say so now and then."

PEERS: dict[str, tuple[str, str, str]] = {
    "streaQ": ("streaq redis", "streaq run app:worker", """
import os
from redis.asyncio import Redis
from streaq import Worker
worker = Worker(redis_url=os.environ["URL"], concurrency=64)
client = Redis.from_url(os.environ["URL"])
@worker.task()
async def tick() -> None:
    await count(client)
async def enqueue(n):
    async with worker:
        for at in range(0, n, 100):
            await worker.enqueue_many([tick.enqueue() for _ in range(min(100, n - at))])
"""),
    "taskiq-redis": ("taskiq-redis taskiq", "taskiq worker app:broker --workers 1 --max-async-tasks 64", """
import os, asyncio
from redis.asyncio import Redis
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker
broker = RedisStreamBroker(os.environ["URL"]).with_result_backend(RedisAsyncResultBackend(os.environ["URL"]))
client = Redis.from_url(os.environ["URL"])
@broker.task
async def tick() -> None:
    await count(client)
async def enqueue(n):
    await broker.startup()
    for at in range(0, n, 100):
        await asyncio.gather(*[tick.kiq() for _ in range(min(100, n - at))])
    await broker.shutdown()
"""),
    "saq": ("saq[redis,hiredis] typing_extensions", "saq app.settings", """
import os, asyncio
from saq import Queue
queue = Queue.from_url(os.environ["URL"])
async def tick(ctx):
    await count(queue.redis)
settings = {"queue": queue, "functions": [tick], "concurrency": 64}
async def enqueue(n):
    await queue.connect()
    for at in range(0, n, 100):
        await asyncio.gather(*[queue.enqueue("tick") for _ in range(min(100, n - at))])
"""),
    "arq": ("arq", "arq app.WorkerSettings", """
import os, asyncio
from arq import create_pool
from arq.connections import RedisSettings
async def tick(ctx):
    await count(ctx["redis"])
class WorkerSettings:
    functions = [tick]
    redis_settings = RedisSettings.from_dsn(os.environ["URL"])
    max_jobs = 64
async def enqueue(n):
    pool = await create_pool(WorkerSettings.redis_settings)
    for at in range(0, n, 100):
        await asyncio.gather(*[pool.enqueue_job("tick") for _ in range(min(100, n - at))])
"""),
}  # fmt: skip
"Requirements, the worker's command, and a module with `enqueue`."

DRIVER = """
import asyncio, json, os, sys, time
import redis
import app
n, url = int(sys.argv[1]), os.environ["URL"]
seen = redis.Redis.from_url(url)
async def main():
    for tasks, blocks in ((50, 1), (n, 1 + n // 50)):
        began = time.perf_counter()
        await app.enqueue(tasks)
        while int(seen.get("done") or 0) < blocks:
            await asyncio.sleep(0.005)
    print(json.dumps({"rate": n / (time.perf_counter() - began)}))
asyncio.run(main())
"""


def python_of(name: str) -> Path:
    """The peer's interpreter; its venv is made when it is first asked for."""
    home = VENVS / name
    python = home / "bin" / "python"
    if not (home / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        wanted = PEERS[name][0].split()
        subprocess.run(
            [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *wanted],
            check=True,
            timeout=INSTALL_S,
        )
        (home / "made").touch()
    return python


def version_of(name: str, python: Path) -> str:
    package = {"taskiq-redis": "taskiq_redis"}.get(name, name.lower())
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def rate(name: str, tasks: int) -> dict[str, object]:
    """Tasks a second, and CPU microseconds of the peer's worker a task."""
    python = python_of(name)
    _, command, module = PEERS[name]
    with (
        tempfile.TemporaryDirectory() as directory,
        Server(directory=Path(directory) / "redis") as server,
    ):
        Path(directory, "app.py").write_text(COUNT + module)
        Path(directory, "drive.py").write_text(DRIVER)
        environ = os.environ | {"URL": server.url, "PYTHONPATH": directory}
        program, *rest = command.split()
        with subprocess.Popen(
            [python, python.with_name(program), *rest], cwd=directory, env=environ, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        ) as worker:  # fmt: skip
            try:
                said = subprocess.run(
                    [python, "drive.py", str(tasks)], cwd=directory, env=environ, check=True, capture_output=True,
                    text=True, timeout=120,
                ).stdout  # fmt: skip
            finally:
                os.killpg(worker.pid, 9)
    return {"version": version_of(name, python), **json.loads(said.splitlines()[-1])}


def rates(tasks: int, passes: int) -> dict[str, dict[str, object]]:
    """Every peer's median rate; those that cannot be installed or run here say why."""
    found = {}
    for name in PEERS:
        try:
            runs = [rate(name, tasks) for _ in range(passes)]
        except (subprocess.SubprocessError, OSError) as error:
            said = getattr(error, "stderr", "") or str(error)
            found[name] = {"error": said.strip().splitlines()[-1]}
            continue
        found[name] = runs[0] | {"rate": statistics.median(run["rate"] for run in runs)}
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(rates(3000, 1), indent=1) + "\n")
