"""What an engine says of its prefix cache reaches the decisions: dispatcher, worker and emulated engine, over Redis.

The engine is also asked behind the dispatcher's back, so that beliefs alone must be wrong.
"""

import aiohttp
import inside
import pytest
from hand import until

from scheduler import codec
from scheduler.prefix import BLOCK_TOKENS
from scheduler.sim.arguments import EngineSettings
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Beat
from workers import kv_feed
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings

MODEL = "emulated"
ROOM = 4096
"KV tokens of the engine: four prompts."


def text(seed):
    """A thousand tokens that begin as no other."""
    return f"{seed:06d}, " + "the river rises, " * 235


def chat(seed):
    return {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": text(seed)}]}


def completion(seed):
    return {"model": MODEL, "max_tokens": 2, "prompt": text(seed)}


def ids(seed):
    return {"model": MODEL, "max_tokens": 2, "prompt": [seed * 1000 + n for n in range(1000)]}


@pytest.fixture
async def engine():
    """One that publishes."""
    settings = EmulatorSettings(
        time_scale=20.0,
        kv_events=True,
        engine=EngineSettings(kv_tokens=ROOM, block_size=32),
        max_model_len=2048,
    )
    async with Emulator(settings) as emulator:
        yield emulator


@pytest.fixture
async def client(engine, redis_url, pool):
    """A client of the whole, which runs while the test does."""
    async with inside.served(engine.url, redis_url=redis_url, pool=pool) as one:
        yield one


async def behind(engine, body):
    """Asked of the engine directly."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(engine.url + path, json=body) as it:
        assert it.status == 200


async def accounts(client):
    """All that was told of the cache."""
    beats = [codec.decode(Beat, f) for _, f in await client.connection.entries(client.keys.beats)]
    return [beat for beat in beats if beat.kv_epoch]


async def served(client, body):
    """What was believed cached when it was decided, and what was found."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = await (await client.submit(body, path=path))

    async def logged():  # why it went there is told some milliseconds after it went
        log = await client.connection.entries(client.keys.decisions)
        decisions = [codec.decode(Decision, fields) for _, fields in log]
        return [d for d in decisions if d.id == answer.record.id and d.kind == "assigned"]

    [decision] = await until(logged)
    return decision.cached_tokens, answer.record.cached_tokens


@pytest.mark.parametrize("body", [chat, completion, ids])
async def test_an_evicted_prefix_is_no_longer_believed(engine, client, body):
    """What the dispatcher sent there once, others have pushed out since."""
    assert await served(client, body(1)) == (0, 0)
    await until(lambda: _told(client, "kv_stored"))
    believed, found = await served(client, body(1))
    assert believed == 7 * BLOCK_TOKENS
    assert found >= believed

    for seed in range(2, 7):
        await behind(engine, body(seed))
    await until(lambda: _told(client, "kv_removed", 7))

    believed, found = await served(client, body(1))
    assert found == 0
    assert believed == 0


async def test_a_prefix_that_others_brought_is_known(engine, client):
    """The dispatcher never saw the prompt, and counts on it."""
    await served(client, ids(1))
    await behind(engine, ids(2))
    await until(lambda: _told(client, "kv_stored", 14))

    believed, found = await served(client, ids(2))

    assert believed == 7 * BLOCK_TOKENS
    assert found >= believed


async def test_all_is_told_anew_for_who_missed_some(engine, client, monkeypatch):
    """From time to time, without being asked."""
    monkeypatch.setattr(kv_feed, "LIST_S", 0.2)
    await served(client, ids(1))
    await until(lambda: _told(client, "kv_stored", 7))

    async def listed_twice():
        told = await accounts(client)
        return max((beat.kv_epoch for beat in told), default=0) >= 3

    await until(listed_twice)
    last = (await accounts(client))[-1].kv_epoch
    listing = [beat for beat in await accounts(client) if beat.kv_epoch == last - 1]
    assert sum(len(beat.kv_stored) for beat in listing) == 7


async def _told(client, field, count=1):
    return sum(len(getattr(beat, field)) for beat in await accounts(client)) >= count
