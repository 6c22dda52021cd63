"""A worker's process killed or frozen with streams open: nothing twice, nothing missing, one record."""

import asyncio
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from hand import Hand, until

from dispatcher.local import Server
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings

pytestmark = pytest.mark.chaos

HEADGATE = str(Path(sys.executable).with_name("headgate"))


@pytest.fixture
async def emulator():
    async with Emulator(EmulatorSettings(time_scale=4.0)) as server:
        yield server


@pytest.fixture
def spawn_at(pool):
    """Start a worker's process at this Redis; all are ended with the test."""
    started = []

    def start(redis_url: str, url: str) -> subprocess.Popen[bytes]:
        environ = os.environ | {
            "HEADGATE_LEASE__WORKER_S": "1",
            "HEADGATE_LEASE__BEAT_S": "0.3",
            "HEADGATE_WORKER__DRAIN_S": "5",
        }
        process = subprocess.Popen(
            [HEADGATE, "--redis", redis_url, "--pool", pool, "worker", "--engine", f"e0={url}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


@pytest.fixture
def spawn(redis_url, spawn_at):
    """The same at the session's Redis."""
    return partial(spawn_at, redis_url)


async def generated_by(emulator):
    async with (
        aiohttp.ClientSession() as session,
        session.get(emulator.url + "/metrics") as response,
    ):
        page = await response.text()
    [line] = [li for li in page.splitlines() if li.startswith("vllm:generation_tokens_total{")]
    return float(line.rsplit(" ", 1)[1])


def body(n_tokens):
    return {
        "model": "emulated",
        "messages": [{"role": "user", "content": "once upon a time"}],
        "max_tokens": n_tokens,
        "vllm_xargs": {"output_tokens": n_tokens},
    }


async def told_uninterrupted(hand, epoch, n_tokens):
    await hand.submit("whole", body(n_tokens), epoch, stream=True)
    await hand.result("whole")
    return await hand.text("whole")


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_stream_survives_its_worker(redis_url, hand, emulator, spawn, death):
    """The second worker goes on where the first one's log ends; what the thawed first still says is refused."""
    first = spawn(emulator.url)
    beat = await hand.ready()
    await hand.submit("r1", body(600), beat.epoch, stream=True)

    async def has_begun():
        return len(await hand.tokens("r1")) > 5

    await until(has_begun)
    first.send_signal(death)

    spawn(emulator.url)
    second = await hand.ready(after=beat.epoch)
    assert await hand.reclaim("r1") == 1
    written = await hand.text("r1")
    await hand.assign("r1", second.epoch, attempt=2)
    if death == signal.SIGSTOP:
        first.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(first.wait, 10) == 2

    result = await hand.result("r1")
    assert (result.outcome, result.attempt, result.output_tokens) == ("completed", 2, 600)
    text = await hand.text("r1")
    assert text.startswith(written)
    assert text == await told_uninterrupted(hand, second.epoch, 600)
    log = await hand.tokens("r1")
    assert {part.attempt for part in log} == {1, 2}
    assert len(await hand.results("r1")) == 1


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_dies_between_an_end_and_its_settling(
    redis_url, hand, emulator, spawn, death
):
    """The record stands, once and for good; whoever takes the job up finds it ended, and nothing stays pending."""
    first = spawn(emulator.url)
    beat = await hand.ready()
    await hand.refuse_to("settle")  # until the next worker brings its functions along
    await hand.submit("r1", body(20), beat.epoch, stream=True)
    await hand.result("r1")
    first.send_signal(death)

    spawn(emulator.url)
    await hand.ready(after=beat.epoch)
    assert await hand.reclaim("r1") == 0
    assert await hand.read_again("r1") == 0, "it has ended"
    if death == signal.SIGSTOP:
        first.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(first.wait, 10) == 2

    assert [result.outcome for result in await hand.results("r1")] == ["completed"]
    assert [part.end for part in await hand.tokens("r1") if part.end] == ["completed"]
    assert await hand.pending() == 0
    assert await hand.rewards("r1") == [], "what it cost died with the worker"


async def test_an_end_is_settled_once_redis_lets_it(hand, emulator, spawn):
    """Refused for a while, it is said again until it is taken: one reward, nothing pending, and the worker drains."""
    process = spawn(emulator.url)
    beat = await hand.ready()
    await hand.refuse_to("settle")
    await hand.submit("r1", body(20), beat.epoch)
    await hand.result("r1")
    process.terminate()

    await hand.relent()

    assert await asyncio.to_thread(process.wait, 10) == 0
    assert [reward.outcome for reward in await hand.rewards("r1")] == ["completed"]
    assert await hand.pending() == 0


async def test_sigterm_ends_a_worker_well(redis_url, hand, emulator, spawn):
    """It finishes what runs and exits 0."""
    process = spawn(emulator.url)
    beat = await hand.ready()
    await hand.submit("r1", body(200), beat.epoch, stream=True)
    await until(lambda: hand.tokens("r1"))

    process.terminate()

    assert await asyncio.to_thread(process.wait, 10) == 0
    assert (await hand.result("r1")).outcome == "completed"


def test_a_malformed_url_is_the_users_mistake(spawn):
    """Exit 2 and one line that names it."""
    process = spawn("localhost:8000")

    _, stderr = process.communicate(timeout=20)

    assert process.returncode == 2
    assert b"url of engine 'e0' is 'localhost:8000', wanted http://host:port" in stderr


async def test_a_frozen_redis_costs_no_token(tmp_path, pool, emulator, spawn_at):
    """Decoding goes on while Redis stands still; what gathered is written after, each token once."""
    with Server(directory=tmp_path) as server:
        hand = await Hand.of(server.url, pool)
        spawn_at(server.url, emulator.url)
        beat = await hand.ready()
        await hand.submit("r1", body(500), beat.epoch, stream=True)
        await until(lambda: hand.tokens("r1"))

        os.kill(server.pid, signal.SIGSTOP)
        said = await generated_by(emulator)

        async def has_said_more():
            return await generated_by(emulator) > said + 100

        await until(has_said_more)
        os.kill(server.pid, signal.SIGCONT)

        result = await hand.result("r1")
        assert (result.outcome, result.attempt, result.output_tokens) == ("completed", 1, 500)
        assert await hand.text("r1") == await told_uninterrupted(hand, beat.epoch, 500)
        await hand.redis.close()
