"""A worker before an engine that is played byte by byte, and badly: its requests end once, the others never notice."""

import asyncio

import pytest
from hand import until
from scripted import ANSWER, CHUNKED, WELL, Scripted, chunk, page

from scheduler.errors import EngineError
from scheduler.settings import (
    EngineAddress,
    LeaseSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
)
from workers import halves
from workers.worker import Worker

BODY = {"model": "m", "prompt": "x"}


@pytest.fixture
async def engine():
    async with Scripted() as played:
        yield played


@pytest.fixture
async def worker(engine, redis_url, pool):
    running = Worker(
        Settings(
            pool=pool,
            redis=RedisSettings(url=redis_url),
            lease=LeaseSettings(worker_s=1.0, beat_s=0.3),
            worker=WorkerSettings(
                engines=(EngineAddress(name="e0", url=engine.url),),
                probe_s=0.1,
                stall_s=0.3,
                drain_s=1.0,
            ),
        )
    )
    task = asyncio.create_task(running.run(lambda: None))
    yield running
    running.stop()
    async with asyncio.timeout(10):
        await task


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"", id="nothing more"),
        pytest.param(chunk(b": and so on\n\n"), id="comments"),
        pytest.param(chunk(ANSWER), id="another one"),
    ],
)
async def test_an_answer_ends_with_done(engine, worker, hand, rest):
    """An engine that leaves the connection open behind it is waited for, but its answer counts, and it stays ready."""
    beat = await hand.ready()
    engine.said = [CHUNKED + chunk(ANSWER) + rest]
    await hand.submit("r1", BODY, beat.epoch, path="/v1/completions", stream=True)

    result = await hand.result("r1")

    assert (result.outcome, await hand.text("r1")) == ("completed", "hi")
    assert not worker.endpoints[0].health.away
    assert not any("sent nothing" in one.reason for one in await hand.beats())


async def test_a_kept_connection_that_the_engine_has_closed_costs_no_attempt(engine, worker, hand):
    """It may close one in the very moment in which it is posted to: that is asked again, over a new one."""
    beat = await hand.ready()
    engine.said = [WELL, None, WELL]
    for request_id in ("r1", "r2"):
        await hand.submit(request_id, BODY, beat.epoch, path="/v1/completions", stream=True)
        result = await hand.result(request_id)
        assert (result.outcome, result.attempt) == ("completed", 1)
        await until(lambda name=request_id: hand.rewards(name))

    assert not engine.said


@pytest.mark.parametrize("queue_ms", ["1e300", "-1e300", "5e5"])
async def test_times_that_cannot_be_are_bounded_by_what_was_seen(engine, worker, hand, queue_ms):
    """The reward can be read, which frees the place that its request took."""
    beat = await hand.ready()
    told = ANSWER.replace(
        b'data: {"c', b'data: {"metrics":{"queue_time_ms":%b},"c' % queue_ms.encode()
    )
    engine.said = [CHUNKED + chunk(told) + b"0\r\n\r\n"]
    await hand.submit("r1", BODY, beat.epoch, path="/v1/completions")

    reward = await hand.reward("r1")

    assert 0 <= reward.queue_s <= reward.prefill_s


@pytest.mark.parametrize("odd", [b'{"a":"\xff"}', b'{"a":'])
def test_parameters_of_kv_are_text(odd):
    """They go through Redis, and into another engine's body."""
    with pytest.raises(EngineError, match="wanted a JSON object"):
        halves.checked(odd)


@pytest.mark.parametrize(
    ("path", "found", "words"),
    [
        pytest.param(
            "/health",
            b"HTTP/1.1 302 So\r\nLocation: http://\xff..a/\r\nContent-Length: 0\r\n\r\n",
            "redirecting",
            id="no UTF-8",
        ),
        pytest.param("/metrics", page(b"x" * (9 * 2**20)), "longer than", id="endless metrics"),
        pytest.param("/health", b"SSH-2.0-x\r\n\r\n", "Bad status line", id="no HTTP"),
    ],
)
async def test_what_it_says_of_itself_may_be_garbage(engine, worker, hand, path, found, words):
    """It is away with the reason, as a beat can carry it, and ready again once it says what is one."""
    beat = await hand.ready()
    sound = engine.pages.get(path, page(b""))
    engine.pages[path] = found

    async def says(state, words):
        last = (await hand.beats())[-1]
        return last.state == state and words in last.reason

    await until(lambda: says("away", words))
    engine.pages[path] = sound
    await until(lambda: says("ready", ""))

    await hand.submit("r1", BODY, beat.epoch, path="/v1/completions")
    assert (await hand.result("r1")).outcome == "completed"


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"HTTP/1.1 101 So\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", id="switch"),
        pytest.param(
            CHUNKED
            + chunk(b'data: {"choices":[{"delta":{"tool_calls":[{"index":[]}]}}]}\n\n')
            + b"0\r\n\r\n",
            id="a tool call without a place",
        ),
        pytest.param(
            CHUNKED + chunk(ANSWER.replace(b'":1}', b'":1' + b"0" * 30 + b"}")) + b"0\r\n\r\n",
            id="absurd usage",
        ),
        pytest.param(2 * WELL, id="two answers"),
        pytest.param(page(b'{"error":{"message":null,"code":-7}}', 500), id="an error of none"),
    ],
)
async def test_one_request_s_garbage_is_its_own(engine, worker, hand, garbage):
    """It goes back, with a reason; the next one over the same worker is served."""
    beat = await hand.ready()
    engine.said = [garbage]
    await hand.submit("r1", BODY, beat.epoch, path="/v1/completions")

    reward = await hand.reward("r1")
    await hand.submit("r2", BODY, beat.epoch, path="/v1/completions")

    assert (reward.outcome, bool(reward.reason)) == ("returned", True)
    assert "the worker failed" not in reward.reason
    assert (await hand.result("r2")).outcome == "completed"
    assert not await hand.results("r1")
