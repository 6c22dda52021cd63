"""The two engines of the suite: our emulator in this process, and real vLLM servers on an emulated clock.

Both are asked for in vLLM's own words. A real server takes 15 seconds to start: those with equal words are shared.
"""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import aiohttp
import pytest
from face import MODEL, Client

from scheduler.sim.arguments import EngineSettings
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings
from workers.fleet.fleet import Fleet, end
from workers.fleet.pod import PodSettings

PROFILE = "h100"

FAST = 100.0
"The emulator's seconds a wall second: a decode step of 7 ms takes 0.07."

REAL_FAST = 2.0
"A real server's own work is about a millisecond a step: much faster it cannot follow."

ROOMY = {"max_num_seqs": 4, "max_model_len": 32_768}
"What most facts want: few seats, long texts."


class Emulated:
    """Engines made on the spot, each in this process."""

    is_real = False

    @contextlib.asynccontextmanager
    async def __call__(self, *, shutdown_timeout=0, is_slow=False, is_ended=False, **words):
        words = ROOMY | words
        max_model_len = words.pop("max_model_len")
        kv_events = words.pop("kv_events", False)
        settings = EmulatorSettings(
            model=MODEL,
            profile=PROFILE,
            time_scale=FAST / 10 if is_slow else FAST,
            engine=EngineSettings(scheduling_policy="priority", block_size=32, **words),
            max_model_len=max_model_len,
            shutdown_timeout_s=shutdown_timeout,
            enable_per_request_metrics=True,
            kv_events=kv_events,
            allow_faults=True,
        )
        async with Emulator(settings) as emulator, Client(emulator.url) as client:
            client.terminate = emulator.terminate
            client.crash = emulator.service.crash
            client.gone = emulator.gone.wait
            yield client


class Real:
    """vLLM servers, kept for the tests that follow unless a test ends them."""

    is_real = True

    def __init__(self, directory, venv):
        self._directory, self._venv = directory, venv
        self._kept = {}
        self._count = 0
        (directory / "models").mkdir()

    @contextlib.asynccontextmanager
    async def __call__(self, *, shutdown_timeout=0, is_slow=False, is_ended=False, **words):
        words = ROOMY | words
        key = repr((sorted(words.items()), shutdown_timeout, is_ended))
        one = self._kept.get(key)
        if one is None:
            one = await self._started(shutdown_timeout, words)
            self._kept[key] = one
        async with Client(one.url) as client:
            client.terminate = lambda: os.kill(one.pid, signal.SIGTERM)
            client.crash = lambda: os.kill(engine_core(one.pid), signal.SIGKILL)
            client.gone = lambda: _closed(client)
            try:
                yield client
            finally:
                if is_ended:
                    await end([self._kept.pop(key)], grace_s=5)
                else:
                    await client.post("/resume")
                    await client.until("num_requests_running", 0)
                    await client.until("num_requests_waiting", 0)

    async def _started(self, shutdown_timeout, words):
        directory = self._directory / str(self._count)
        self._count += 1
        directory.mkdir()
        (directory / "models").symlink_to(self._directory / "models")
        more = {"max-num-queued-reqs": words.get("max_num_queued_reqs")}
        settings = PodSettings(
            venv=self._venv,
            directory=directory,
            model=MODEL,
            time_scale=REAL_FAST,
            max_num_seqs=words["max_num_seqs"],
            max_model_len=words["max_model_len"],
            kv_tokens=words.get("kv_tokens", 0),
            shutdown_timeout_s=shutdown_timeout,
            kv_events=words.get("kv_events", False),
            is_tied=True,
            more=(
                "--enable-scale-out",
                "--enable-server-load-tracking",
                *(f"--{key}={value}" for key, value in more.items() if value is not None),
            ),
        )
        (one,) = await Fleet(directory).up(settings, [PROFILE])
        return one

    async def end(self):
        await end(list(self._kept.values()), grace_s=5)


def engine_core(pid):
    """The process with the engine in it, a child of the API server's."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        if "EngineCor" in Path(f"/proc/{child}/comm").read_text():
            return int(child)
    pytest.fail(f"no EngineCore among the children of {pid}: {children}")


async def _closed(client):
    """Return when nobody listens there any more."""
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            try:
                await client.get("/health")
            except aiohttp.ClientConnectorError:
                return
            except aiohttp.ClientError:
                pass
        await asyncio.sleep(0.05)
