"""Requests in two legs as a user runs them, `headgate up --roles`, and whatever is killed between the legs or within one."""

import asyncio
import contextlib
import os
import secrets
import signal
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from hand import until
from stacks import up

from dispatcher.cli.explain import told
from dispatcher.client import Client
from scheduler import codec
from scheduler.errors import RequestCancelled
from scheduler.wire.client import Control

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("two legs")]

FLEET = ("--emulate", "4", "--profiles", "h100,h100,a100,a100")
ROLES = ("--roles", "prefill,prefill,decode,decode")
DECODING = ("a100-0", "a100-1")
WORDS = 20_000
"Some 30,000 tokens: seconds on an H100, in which a test can do something."

N_TOKENS = 120


@contextlib.contextmanager
def serving(directory, settings):
    config = directory / "settings.toml"
    config.write_text(settings)
    with up(directory, *FLEET, *ROLES, "--config", config) as ready:
        yield ready


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """Two that prefill and two that decode."""
    with serving(tmp_path_factory.mktemp("up"), "[lease]\nleader_s = 1.0\nkv_s = 25.0\n") as ready:
        yield ready


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """The same, where KV is not relied on for longer than a moment."""
    with serving(tmp_path_factory.mktemp("up"), "[lease]\nkv_s = 0.7\n") as ready:
        yield ready


def asked(*, words=WORDS):
    """A prompt that nobody has seen."""
    seed = secrets.token_hex(2)
    text = " ".join(f"{seed}{n % 10}" for n in range(words))
    return {"model": "emulated", "prompt": text, "max_tokens": N_TOKENS, "ignore_eos": True}


async def whole(ready, body, name="a100-0"):
    """What one engine alone says of it, asked behind everybody's back."""
    [url] = [one["url"] for one in ready["endpoints"] if one["name"] == name]
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=body) as response,
    ):
        assert response.status == 200
        return (await response.json())["choices"][0]["text"]


def at(ready):
    return Client(redis=ready["redis"], pool=ready["pool"])


async def order(client, action, names=DECODING):
    for name in names:
        word = codec.encode(Control(action=action, endpoint=name))
        await client.connection.add(client.keys.controls, word)


async def stands(client, request_id, *, leg, state):
    async def found():
        seen = await client.status(request_id)
        return (seen.leg, seen.state) == (leg, state) and seen

    return await until(found)


async def between(client, body, **wishes):
    """A request whose prompt is computed, and that nobody may decode."""
    handle = await client.submit(body, **wishes)
    await stands(client, handle.id, leg="prefill", state="running")
    await order(client, "drain")
    await stands(client, handle.id, leg="prefill", state="waiting")
    return handle


async def legs(client, request_id):
    """How often each leg ended, and how."""
    story = await told(client, request_id)
    return Counter((reward.leg, reward.outcome) for reward in story.rewards)


async def ends(handle):
    async with asyncio.timeout(60):
        return await handle


async def streamed(handle, pieces):
    async for text in handle:
        pieces.append(text)


def killed(ready, name):
    """SIGKILL; an engine in whichever life of it, known by the port that it keeps."""
    pid = ready["pids"][name]
    if not Path(f"/proc/{pid}").exists():
        [url] = [one["url"] for one in ready["endpoints"] if one["name"] == name]
        wanted = {b"emulate", url.rpartition(":")[2].encode()}
        pid = next(pid for pid, words in running() if wanted <= words)
    os.kill(pid, signal.SIGKILL)


def running():
    """Everybody's number and words."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            yield int(line.parent.name), {*line.read_bytes().split(b"\0")}


async def gone(ready, client, name):
    """Killed, as often as it comes back before its worker has noticed: tokens that came lately excuse it for 2 s."""

    async def away():
        with contextlib.suppress(StopIteration, ProcessLookupError):  # between two lives
            killed(ready, name)
        raw = await client.connection.command("HGET", client.keys.endpoint(name), "state")
        return raw == b"away"

    await until(away)


async def reborn(ready, client, name):
    """It serves again, under the same address."""

    async def alive():
        raw = await client.connection.command("HGET", client.keys.endpoint(name), "state")
        return raw == b"ready"

    await until(alive)


async def leader(client):
    return await client.connection.command("HMGET", client.keys.leader, "node", "epoch")


class TestAllIsWell:
    async def test_it_says_what_a_whole_says(self, system):
        """Computed on one of those that prefill, decoded on one of those that decode, once each."""
        async with at(system) as client:
            body = asked()
            handle = await client.submit(body)
            answer = await ends(handle)
            assert answer.text == await whole(system, body)
            assert answer.record.endpoint in DECODING
            assert await legs(client, handle.id) == {
                ("prefill", "prefilled"): 1,
                ("decode", "completed"): 1,
            }

    async def test_many_at_once(self, system):
        """Streams and others, long and short; what is said is what each would have been told alone."""
        async with at(system) as client:
            bodies = [asked(words=1_000 * (1 + n % 5)) for n in range(24)]
            handles = [
                await client.submit(body, stream=n % 2 == 0) for n, body in enumerate(bodies)
            ]
            answers = [await ends(handle) for handle in handles]
            for body, answer in zip(bodies, answers, strict=True):
                assert answer.text == await whole(system, body)
            counts = sum([await legs(client, handle.id) for handle in handles], Counter())
            assert counts["prefill", "prefilled"] > 0
            assert counts["decode", "completed"] + counts["whole", "completed"] == len(bodies)


class TestBetweenTheLegs:
    async def test_a_new_leader_goes_on(self, system):
        """SIGKILL: what was computed is decoded, and not computed again."""
        async with at(system) as client:
            body = asked()
            handle = await between(client, body)
            before = await leader(client)
            name = (
                "dispatcher"
                if before[0].endswith(str(system["pids"]["dispatcher"]).encode())
                else "standby"
            )
            killed(system, name)

            async def led():
                now = await leader(client)
                return now[1] != before[1]

            await until(led)
            await order(client, "resume")
            answer = await ends(handle)
            assert answer.text == await whole(system, body)
            assert await legs(client, handle.id) == {
                ("prefill", "prefilled"): 1,
                ("decode", "completed"): 1,
            }

    async def test_the_engine_that_has_the_kv_dies(self, system):
        """It is computed again, elsewhere or there."""
        async with at(system) as client:
            body = asked()
            handle = await between(client, body)
            story = await told(client, handle.id)
            name = story.rewards[0].endpoint
            await gone(system, client, name)
            await order(client, "resume")
            answer = await ends(handle)
            assert answer.text == await whole(system, body)
            assert (await legs(client, handle.id))["decode", "returned"] == 0
            await reborn(system, client, name)

    async def test_cancelled(self, system):
        async with at(system) as client:
            handle = await between(client, asked())
            await handle.cancel()
            with pytest.raises(RequestCancelled):
                await ends(handle)
            await order(client, "resume")

    async def test_its_lease_runs_out(self, hasty):
        """Begun again, and as often as it takes."""
        async with at(hasty) as client:
            body = asked()
            handle = await between(client, body)

            async def lost():
                story = await told(client, handle.id)
                return any(decision.kind == "kv_lost" for decision in story.decisions)

            await until(lost)
            await order(client, "resume")
            answer = await ends(handle)
            assert answer.text == await whole(hasty, body)


class TestWithinOne:
    async def test_the_engine_that_decodes_dies(self, system):
        """In the middle of a stream: the rest follows, and nothing of it twice."""
        async with at(system) as client:
            body = asked()
            handle = await client.submit(body, stream=True)
            pieces = []
            reading = asyncio.create_task(streamed(handle, pieces))
            await until(lambda: len(pieces) > 5)
            standing = await client.status(handle.id)
            assert standing.leg == "decode"
            killed(system, standing.endpoint)
            async with asyncio.timeout(60):
                await reading
            assert "".join(pieces) == await whole(
                system, body, next(n for n in DECODING if n != standing.endpoint)
            )
            await reborn(system, client, standing.endpoint)

    async def test_the_engine_that_prefills_dies(self, system):
        async with at(system) as client:
            body = asked()
            handle = await client.submit(body)
            standing = await stands(client, handle.id, leg="prefill", state="running")
            killed(system, standing.endpoint)
            answer = await ends(handle)
            assert answer.text == await whole(system, body)
            await reborn(system, client, standing.endpoint)
