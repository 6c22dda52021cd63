"""The main job on real vLLM servers: four on the clocks of two GPUs, and one that really computes.

The texts of servers on emulated clocks follow from their prompts alone. So an answer that was begun on one server and
ended on another must be, to the letter, the one that a server left in peace gives.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import defaultdict

import aiohttp
import pytest
from engines import engine_core
from face import Client as Engine
from fleets import HEADGATE
from hand import until

from dispatcher.client import Client
from scheduler import codec, prefix
from scheduler.errors import RequestCancelled
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Beat, Result, Reward

pytestmark = pytest.mark.timeout(300)

SEATS = 8
FLEET = (
    *("4", "--profiles", "h100,l40s", "--compute", "1", "--max-num-seqs", str(SEATS)),
    "--kv-events",
)
"Two H100, two L40S, and a CPU."

FLOOD = 24
TOKENS = 300
"Of each answer of a flood: two to ten seconds on these clocks."


@pytest.fixture
async def client(system):
    """A client of the system."""
    async with Client(redis=system["redis"], pool=system["pool"]) as one:
        yield one


def asks(prompt, output_tokens=TOKENS, **more):
    return {
        "model": "emulated",
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
    } | more


class Flood:
    """Requests that are answered on the pool's common stream, every record of theirs, also a second one."""

    def __init__(self, client, name):
        self._client, self._name = client, name
        self._records = defaultdict(list)
        self._after = "0-0"

    async def send(self):
        for number in range(FLOOD):
            body = asks(f"def tell_{number}(me):")
            fields = {
                "id": f"{self._name}-{number}",
                "model": "emulated",
                "body": json.dumps(body),
                "path": "/v1/completions",
                "stream": str(
                    number % 2
                ),  # half of them go on where they were, the others begin anew
            }
            await self._client.connection.add(self._client.keys.requests, fields)
        return self

    async def begun(self):
        """Return when a third of them is under way."""
        async with asyncio.timeout(60):
            while await self._running() < FLOOD // 3:  # noqa: ASYNC110  a hash has no events
                await asyncio.sleep(0.02)

    async def _running(self):
        states = await self._client.connection.commands(
            [
                ("HGET", self._client.keys.request(f"{self._name}-{n}"), "state")
                for n in range(FLOOD)
            ]
        )
        return sum(state == b"running" for state in states)

    async def ended(self):
        """Each one's only record, by its number."""
        async with asyncio.timeout(120):
            while len(self._records) < FLOOD:
                await self._read(1.0)
        await self._read(1.0)  # whoever says it twice says it soon
        assert [len(found) for found in self._records.values()] == [1] * FLOOD
        return {int(name.rpartition("-")[2]): found[0] for name, found in self._records.items()}

    async def _read(self, block_s):
        results = self._client.keys.results
        came = await self._client.connection.read(
            {results: self._after}, count=500, block_s=block_s
        )
        for entry, fields in came.get(results, []):
            self._after = entry
            record = codec.decode(Result, fields)
            if record.id.startswith(self._name + "-"):
                self._records[record.id].append(record)


def texts(records):
    """What was said, by number."""
    assert {record.outcome for record in records.values()} == {"completed"}, records
    assert {record.output_tokens for record in records.values()} == {TOKENS}
    return {
        number: json.loads(record.body)["choices"][0]["text"] for number, record in records.items()
    }


@pytest.fixture(scope="module")
def in_peace():
    """The texts of a flood in peace, once known."""
    return {}


@pytest.fixture
async def flood(client, in_peace, request):
    """A flood under way, and the texts that must come of it."""
    if not in_peace:
        in_peace |= texts(await (await Flood(client, "peace").send()).ended())
    name = request.node.name.removeprefix("test_")
    found = await Flood(client, name).send()
    await found.begun()
    return found


async def running_in(endpoints):
    """Requests inside the engines that answer."""
    count = 0
    for one in endpoints.values():
        with contextlib.suppress(aiohttp.ClientError):
            async with Engine(one["url"]) as engine:
                count += await engine.metric("num_requests_running")
    return count


class TestService:
    async def test_a_stream_joined_is_the_answer(self, client):
        """Pieces come before the end."""
        handle = await client.submit(asks("tell me", stream=True), ttft_s=5.0)
        pieces = [text async for text in handle]
        answer = await handle

        assert len(pieces) > 1
        assert "".join(pieces) == answer.text
        assert (answer.record.output_tokens, answer.on_time) == (TOKENS, True)

    async def test_the_one_that_computes_serves_its_own_model(self, client):
        """Real logits of random weights, chat and completion."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}

        chat = await (await client.submit(body | {"ignore_eos": True}))
        plain = await (await client.submit(asks("hi", 20, model="tiny")))

        assert (chat.record.endpoint, plain.record.endpoint) == ("cpu-0", "cpu-0")
        assert (chat.record.output_tokens, plain.record.output_tokens) == (20, 20)

    async def test_status_says_what_the_engines_can_do(self, system):
        """All that they were started with."""
        shown = await asyncio.to_thread(
            subprocess.run,
            [HEADGATE, "status", "--redis", system["redis"], "--pool", system["pool"], "--json"],
            capture_output=True,
            check=True,
        )

        beats = [one["beat"] for one in json.loads(shown.stdout)["endpoints"]]
        wanted = ["request_metrics", "cached_tokens", "priority", "admission", "pause", "kv_events"]
        assert [beat["engine"] for beat in beats] == ["0.32.0"] * 5
        assert [beat["features"] for beat in beats] == [wanted] * 5

    async def test_the_urgent_pass_the_patient(self, client):
        """Before a line of four times the seats, an urgent request does not wait for the line to end."""
        patient = await client.submit_many(
            [client.request(asks(f"p{n}"), priority=0) for n in range(16 * SEATS)]
        )
        urgent = await client.submit(asks("u", 20), priority=9, ttft_s=1.0)

        first = (await urgent).record.first_token_at
        later = [(await handle).record.first_token_at for handle in patient]

        assert sum(at > first for at in later) > len(later) // 3

    async def test_a_cancellation_reaches_the_engine(self, client, endpoints):
        """Nothing runs on."""
        handle = await client.submit(asks("endless", 20_000, stream=True))
        async for _ in handle.pieces():
            break
        assert await running_in(endpoints) == 1

        await handle.cancel("enough")

        with pytest.raises(RequestCancelled):
            await handle
        async with asyncio.timeout(10):
            while await running_in(endpoints):  # noqa: ASYNC110  a server has no events
                await asyncio.sleep(0.05)

    async def test_what_the_engine_cached_is_said(self, client):
        """The same prompt again, to the same endpoint for the sake of its cache."""
        prompt = [3000 + n for n in range(1000)]
        answers = [await (await client.submit(asks(prompt, 4))) for _ in range(6)]

        cached = [answer.record.cached_tokens for answer in answers]
        assert cached[0] == 0
        assert 992 in cached

    async def test_a_prefix_that_the_engine_lost_is_not_believed(self, client, endpoints):
        """A chat, whose blocks are cut by the byte: known where it was, and forgotten with the engine's cache."""
        text = "".join(f"chapter {n}, in which the river rises; " for n in range(150))
        body = {
            "model": "emulated",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 4,
        }

        first = await (await client.submit(body))
        server = endpoints[first.record.endpoint]
        wanted = len(prefix.blocks(text)) - 1
        await until(lambda: self.told(client, server["name"], "kv_stored", wanted))
        second = await (await client.submit(body))
        believed = await self.believed(client, second)
        async with Engine(server["url"]) as engine:
            await engine.post("/reset_prefix_cache")
            await engine.ask(prompt=[1], max_tokens=1)
        await until(lambda: self.told(client, server["name"], "kv_was_empty"))
        third = await (await client.submit(body))

        assert second.record.endpoint == first.record.endpoint
        assert believed >= wanted * prefix.BLOCK_TOKENS
        assert second.record.cached_tokens > 0.8 * second.record.prompt_tokens
        assert await self.believed(client, third) == 0

    async def told(self, client, name, field, count=1):
        entries = await client.connection.newest(client.keys.beats, after="0", count=500)
        beats = [codec.decode(Beat, fields) for _, fields in entries]
        found = [getattr(beat, field) for beat in beats if beat.endpoint == name]
        return sum(x if isinstance(x, bool) else len(x) for x in found) >= count

    async def believed(self, client, answer):
        own = await self.written(
            client, client.keys.decisions, Decision, answer, lambda d: d.kind == "assigned"
        )
        return own.cached_tokens

    async def written(self, client, log, kind, answer, is_wanted=lambda _: True):
        """What a log says of a request. It is written when nobody waits for it: perhaps after the answer."""

        async def logged():
            entries = await client.connection.newest(log, after="0", count=100)
            said = [codec.decode(kind, fields) for _, fields in entries]
            return [one for one in said if one.id == answer.record.id and is_wanted(one)]

        (own,) = await until(logged)
        return own

    async def test_the_engines_own_times_are_in_the_rewards(self, client):
        """Its queue apart from its prefill, from `--enable-per-request-metrics`."""
        answer = await (await client.submit(asks("reward me", 4)))

        own = await self.written(client, client.keys.rewards, Reward, answer)
        assert own.queue_s is not None
        assert own.prefill_s > own.queue_s >= 0


class TestTrouble:
    """Every request of the flood ends once, with the text that it would have had in peace."""

    async def test_an_abort_in_the_engine(self, flood, endpoints, in_peace):
        """Finish reason abort is no answer: what was written stays, the rest comes from elsewhere."""
        async with Engine(endpoints["h100-0"]["url"]) as engine:
            await engine.post("/pause?mode=abort")
            await engine.post("/resume")

        assert texts(await flood.ended()) == in_peace

    async def test_a_pause_for_a_while(self, flood, endpoints, in_peace):
        """Healthy to /health, and holding all it has."""
        async with Engine(endpoints["h100-1"]["url"]) as engine:
            await engine.post("/pause?mode=keep")
            records = await flood.ended()
            await engine.post("/resume")

        assert texts(records) == in_peace

    async def test_a_frozen_server(self, flood, endpoints, in_peace):
        """SIGSTOP to all its processes: the port accepts, nobody answers."""
        pid = endpoints["l40s-0"]["pid"]
        os.killpg(pid, signal.SIGSTOP)
        try:
            records = await flood.ended()
        finally:
            os.killpg(pid, signal.SIGCONT)

        assert texts(records) == in_peace

    async def test_a_drained_server(self, flood, endpoints, in_peace):
        """SIGTERM: running streams end at once with a 200 and finish reason abort."""
        os.kill(endpoints["l40s-1"]["pid"], signal.SIGTERM)

        assert texts(await flood.ended()) == in_peace

    async def test_a_killed_server(self, flood, endpoints, in_peace):
        """SIGKILL to all its processes."""
        os.killpg(endpoints["h100-1"]["pid"], signal.SIGKILL)

        assert texts(await flood.ended()) == in_peace

    async def test_a_killed_engine_core(self, flood, endpoints, in_peace):
        """Its API server goes after it, and every stream ends in an error inside a 200."""
        os.kill(engine_core(endpoints["h100-0"]["pid"]), signal.SIGKILL)

        records = await flood.ended()

        assert texts(records) == in_peace
        assert {record.endpoint for record in records.values()} <= {"l40s-0", "h100-0"}
