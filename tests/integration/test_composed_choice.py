"""A profile and shares of tenants, live: `[profile]` and `[fairness]` in the settings, through Redis to emulated engines."""

import asyncio
from collections import Counter

import aiohttp
import msgspec
import pytest
from stacks import up

from dispatcher import glance
from dispatcher.cli import explain
from dispatcher.client import Client
from dispatcher.recovery import Saved
from scheduler import codec
from scheduler.wire.dispatcher import Decision

N, PROMPT_TOKENS, ANSWER_TOKENS = 24, 3000, 2
QUANTUM = 2 * PROMPT_TOKENS

SETTINGS = f"""
[plan]
explore = 0.0

[[profile.filters]]
name = "label-filter"
by = "hardware"
deny = ["a100*"]

[[profile.scorers]]
name = "predicted-latency-scorer"

[profile.picker]
name = "max-score-picker"

[fairness]
quantum_tokens = {QUANTUM}

[fairness.weights]
gold = 2.0
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """Two engines of which the profile forbids the faster."""
    directory = tmp_path_factory.mktemp("choice")
    config = directory / "settings.toml"
    config.write_text(SETTINGS)
    words = ("--emulate", "2", "--profiles", "a100,l40s", "--config", config)
    with up(directory, *words) as ready:
        yield ready


@pytest.fixture
async def client(system):
    async with Client(redis=system["redis"], pool=system["pool"]) as one:
        yield one


def asks(client, tenant, number):
    """A prompt that shares no beginning with any other."""
    body = {
        "model": "emulated",
        "prompt": f"{tenant} {number} " + "river " * (PROMPT_TOKENS * 2 // 3),
        "max_tokens": 2 * ANSWER_TOKENS,
        "vllm_xargs": {"output_tokens": ANSWER_TOKENS},
    }
    return client.request(body, id=f"{tenant}-{number}", tenant=tenant)


async def assigned(client):
    """Decisions that handed a request over, in order."""
    entries = await client.connection.entries(client.keys.decisions, "-", count=10_000)
    decisions = [codec.decode(Decision, fields) for _, fields in entries]
    return [one for one in decisions if one.kind == "assigned"]


async def test_shares_are_kept_and_the_filter_obeyed(system, client):
    """One tenant has twice the other's share while both wait, and nobody is put where the profile forbids."""
    tenants = ("plain", "gold")
    handles = await client.submit_many(asks(client, t, n) for t in tenants for n in range(N))
    async with asyncio.timeout(90):
        async for handle in client.results(handles):
            await handle

    made = await assigned(client)
    endpoints = {one.endpoint for one in made}
    assert endpoints == {one["name"] for one in system["endpoints"] if one["hardware"] == "l40s"}
    order = [one.id.partition("-")[0] for one in made]
    both_wait = order[: max(at for at, tenant in enumerate(order) if tenant == "gold") + 1]
    counts = Counter(both_wait)
    # Whoever is a quantum ahead stands behind: a quantum over its weight is so many requests of either.
    slack = QUANTUM / PROMPT_TOKENS * 2
    assert counts["gold"] == N
    assert abs(counts["plain"] - N / 2) <= slack

    # What a new leader would take over, and what people see of it.
    saved = await snapshot(client, n=2 * N)
    assert "plain" in saved.core.given.had
    assert saved.core.given.floor > 0
    found = await glance.pool(client.connection, client.keys)
    [served] = [one for one in found.endpoints if one.beat.endpoint in endpoints]
    assert served.believed == "learned"
    assert 0 < served.within_q90 <= 1
    story = await explain.told(client, "gold-0")
    assert any("nine in ten within" in line.detail for line in explain.lines(story))
    async with (
        aiohttp.ClientSession() as visitor,
        visitor.get(system["metrics"]["dispatcher"]) as page,
    ):
        figures = await page.text()
    assert f'headgate_endpoint_on_prior{{endpoint="{served.beat.endpoint}"' in figures
    assert "headgate_forecasts_covered_total{pool=" in figures


async def snapshot(client, *, n):
    """The first that holds what so many requests have taught."""
    async with asyncio.timeout(20):
        while True:
            raw = await client.connection.command("GET", client.keys.snapshot)
            saved = msgspec.json.decode(raw, type=Saved) if raw else None
            if saved and sum(life.count for life in saved.core.learned.endpoints.values()) >= n:
                return saved
            await asyncio.sleep(0.2)
