"""The sidecar between a real Redis and an emulated vLLM over HTTP; the test plays the dispatcher."""

import asyncio

import aiohttp
import msgspec
import pytest
from hand import Hand, until

from scheduler.settings import (
    EngineAddress,
    LeaseSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
)
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings
from workers.worker import Worker

MODEL = "emulated"


def chat(n_tokens, **more):
    """A chat of exactly so many tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "tell me a story"}],
        "vllm_xargs": {"output_tokens": n_tokens},
        "max_tokens": n_tokens,
        **more,
    }


@pytest.fixture
async def emulator():
    async with Emulator(
        EmulatorSettings(time_scale=20.0, allow_faults=True, enable_per_request_metrics=True),
        die=lambda: None,
    ) as server:
        yield server


@pytest.fixture
async def hand(redis_url, pool):
    player = await Hand.of(redis_url, pool)
    yield player
    await player.redis.close()


class Rig:
    """Workers started by a test, ended with it."""

    def __init__(self, redis_url, pool):
        self.redis_url, self.pool = redis_url, pool
        self.tasks = []

    async def start(self, *engines, **settings):
        lease = settings.pop("lease", LeaseSettings(worker_s=1.0, beat_s=0.3))
        worker = Worker(
            Settings(
                pool=self.pool,
                redis=RedisSettings(url=self.redis_url),
                lease=lease,
                worker=WorkerSettings(
                    engines=tuple(
                        EngineAddress(name=f"e{n}", url=url) for n, url in enumerate(engines)
                    ),
                    **{"probe_s": 0.1, "drain_s": 5.0} | settings,
                ),
            )
        )
        started = asyncio.Event()
        task = asyncio.create_task(worker.run(started.set))
        self.tasks.append((worker, task))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        return worker, task

    async def close(self):
        for worker, task in self.tasks:
            worker.stop()
            worker.stop()
            if not task.done():
                async with asyncio.timeout(10):
                    await task


@pytest.fixture
async def rig(redis_url, pool):
    started = Rig(redis_url, pool)
    yield started
    await started.close()


async def ask(emulator, path, body):
    """What the emulator itself says to it."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(emulator.url + path, json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


async def whole_text(emulator, body):
    said = await ask(emulator, "/v1/chat/completions", body)
    return said["choices"][0]["message"]["content"]


async def fault(emulator, kind, **fields):
    async with (
        aiohttp.ClientSession() as session,
        session.post(emulator.url + "/emulator/fault", json={"kind": kind, **fields}) as response,
    ):
        assert response.status == 200, await response.text()


async def running_in(emulator):
    async with (
        aiohttp.ClientSession() as session,
        session.get(emulator.url + "/metrics") as response,
    ):
        page = await response.text()
    [line] = [li for li in page.splitlines() if li.startswith("vllm:num_requests_running")]
    return float(line.rsplit(" ", 1)[1])


class TestSuccess:
    async def test_a_streaming_job_fills_the_token_log(self, emulator, hand, rig):
        """The joined log is the engine's own text, the last entry says how it ended."""
        await rig.start(emulator.url)
        beat = await hand.ready()
        body = chat(40)

        await hand.submit("r1", body, beat.epoch, stream=True)

        result = await hand.result("r1")
        expected = await whole_text(emulator, body)
        assert result.outcome == "completed"
        assert (result.output_tokens, result.finish_reason) == (40, "stop")
        assert await hand.text("r1") == expected
        log = await hand.tokens("r1")
        assert [part.end for part in log if part.end] == ["completed"]
        assert msgspec.json.decode(result.body)["choices"][0]["message"]["content"] == expected
