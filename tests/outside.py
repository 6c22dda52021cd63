"""What the official `openai` client must find at a door: the same facts before emulated engines and before real vLLM.

A test file of either kind says `from outside import *` in its own words: it makes the fixture `system`, which is the
ready line of `headgate up`, and a subclass of `Facts`. All engines serve the model `emulated`, whose words follow from
the prompt alone.
"""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from face import Client as Engine
from face import patient

from dispatcher.client import Client

HEADGATE = Path(sys.executable).with_name("headgate")
MODEL = "emulated"
ENDLESS = 20_000


class Asynchronous:
    """`openai.AsyncOpenAI`."""

    def __init__(self, url):
        self._ai = openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)

    async def models(self):
        return [model.id for model in (await self._ai.models.list()).data]

    async def whole(self, kind, **asked):
        """The answer and its headers."""
        face = self._ai.chat.completions if kind == "chat" else self._ai.completions
        got = await face.with_raw_response.create(**body(kind, asked))
        return got.parse(), got.headers

    async def stream(self, kind, **asked):
        """Its chunks."""
        face = self._ai.chat.completions if kind == "chat" else self._ai.completions
        return [chunk async for chunk in await face.create(**body(kind, asked), stream=True)]

    @contextlib.asynccontextmanager
    async def begun(self, kind, **asked):
        """A stream that has said its first word; closed at the block's end."""
        face = self._ai.chat.completions if kind == "chat" else self._ai.completions
        stream = await face.create(**body(kind, asked), stream=True)
        await anext(aiter(stream))
        yield
        await stream.close()

    async def close(self):
        await self._ai.close()


class Synchronous:
    """`openai.OpenAI`, each call in a thread."""

    def __init__(self, url):
        self._ai = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)

    async def models(self):
        return await asyncio.to_thread(lambda: [m.id for m in self._ai.models.list().data])

    async def whole(self, kind, **asked):
        face = self._ai.chat.completions if kind == "chat" else self._ai.completions
        got = await asyncio.to_thread(face.with_raw_response.create, **body(kind, asked))
        return got.parse(), got.headers

    async def stream(self, kind, **asked):
        face = self._ai.chat.completions if kind == "chat" else self._ai.completions
        asked = body(kind, asked) | {"stream": True}
        return await asyncio.to_thread(lambda: list(face.create(**asked)))

    @contextlib.asynccontextmanager
    async def begun(self, kind, **asked):
        face = self._ai.chat.completions if kind == "chat" else self._ai.completions
        stream = await asyncio.to_thread(face.create, **body(kind, asked), stream=True)
        await asyncio.to_thread(next, iter(stream))
        yield
        await asyncio.to_thread(stream.close)

    async def close(self):
        self._ai.close()


def body(kind, asked):
    """A request of twelve tokens, unless it says otherwise."""
    prompt = asked.pop("prompt", "tell me of rivers")
    said = (
        {"messages": [{"role": "user", "content": prompt}]}
        if kind == "chat"
        else {"prompt": prompt}
    )
    tokens = asked.pop("max_tokens", 12)
    return {"model": MODEL, "max_tokens": tokens, "extra_body": {"ignore_eos": True}} | said | asked


def text(answer):
    """The words of an answer or of a chunk."""
    if not answer.choices:
        return ""
    [choice] = answer.choices
    said = getattr(choice, "message", None) or getattr(choice, "delta", None)
    return (said.content if said else choice.text) or ""


class Facts:
    """Asked by either face of the client."""

    @pytest.fixture(params=[Asynchronous, Synchronous], ids=["async", "sync"])
    async def ai(self, request, system):
        one = request.param(f"{system['door']}/v1")
        yield one
        await one.close()

    @pytest.mark.parametrize("kind", ["chat", "completion"])
    async def test_a_stream_joined_is_the_answer(self, ai, kind):
        """Whole and in chunks: the same words, the reason, and where it is wanted the engine's count."""
        whole, headers = await ai.whole(kind)
        plain = await ai.stream(kind)
        counted = await ai.stream(kind, stream_options={"include_usage": True})

        assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (12, "length")
        assert headers["x-headgate-endpoint"]
        for chunks in (plain, counted[:-1]):
            assert "".join(map(text, chunks)) == text(whole) != ""
            assert chunks[-1].choices[0].finish_reason == "length"
        assert all(chunk.usage is None for chunk in plain)
        assert (counted[-1].choices, counted[-1].usage) == ([], counted[-1].usage)
        assert counted[-1].usage.completion_tokens == 12
        assert counted[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 0

    async def test_models(self, ai):
        """What the engines serve."""
        assert await ai.models() == [MODEL]

    async def test_who_disconnects_frees_the_engine(self, ai, system):
        """Nothing runs on, although 20,000 tokens were asked for."""
        async with ai.begun("completion", max_tokens=ENDLESS):
            assert await running(system) == 1

        await falls_to(0, system)

    async def test_promises_by_llmds_headers(self, ai, system):
        """They are in the pool's own request, and the record says whether they were kept."""
        said = {
            "x-request-id": f"promised-{type(ai).__name__}",
            "x-llm-d-slo-ttft-ms": "60000",
            "x-llm-d-slo-tpot-ms": "60000",
            "x-llm-d-inference-fairness-id": "team-a",
        }
        answer, headers = await ai.whole("chat", extra_headers=said)

        assert answer.choices[0].message.content
        async with Client(redis=system["redis"], pool=system["pool"]) as client:
            request_id = headers["x-headgate-request"]
            record = await (await client.attach(request_id)).record()
            entry = (await client.status(request_id)).entry
            [(_, fields)] = await client.connection.entries(client.keys.requests, entry, entry)
        assert record.on_time is True
        wanted = {b"ttft_ms": b"60000", b"tpot_ms": b"60000", b"tenant": b"team-a"}
        assert {name: fields[name] for name in wanted} == wanted

    async def test_what_the_engine_refuses(self, ai):
        """The engine's own 400, in its own words."""
        with pytest.raises(openai.BadRequestError, match=r"max_tokens|max_model_len|maximum"):
            await ai.whole("completion", max_tokens=10**9)

    async def test_a_model_that_nobody_serves(self, ai):
        """404, and which there are."""
        with pytest.raises(openai.NotFoundError, match=MODEL):
            await ai.whole("completion", model="nobody's")

    @pytest.mark.parametrize("way", ["whole", "stream"])
    async def test_a_deadline_that_passes_in_the_queue(self, ai, way, drained):
        """504, whether or not a stream was asked for: nothing had been said."""
        late = {"x-headgate-deadline-ms": "50"}

        with pytest.raises(openai.InternalServerError, match="deadline") as refused:
            await getattr(ai, way)("completion", extra_headers=late)

        assert refused.value.status_code == 504

    async def test_a_deadline_that_passes_in_mid_stream(self, ai):
        """The words that came stay; the client raises what follows them."""
        late = {"x-headgate-deadline-ms": "1000"}

        with pytest.raises(openai.APIError, match="deadline"):
            await ai.stream("completion", max_tokens=ENDLESS, extra_headers=late)

    async def test_contended(self, ai, system, drained):
        """Nobody takes it within the time it may wait: 429, why, and when to come back."""
        short = {"x-llm-d-inference-ttl": "50ms"}

        with pytest.raises(openai.RateLimitError) as refused:
            await ai.whole("completion", extra_headers=short)

        assert refused.value.response.headers["x-headgate-reason"] == "rejected"
        assert int(refused.value.response.headers["retry-after"]) >= 1

    async def test_nobody_there(self, ai, system, paused):
        """The engines are there and serve nobody: 503, why, and when to come back."""
        async with patient(lambda: "the door still shows models"):
            while await ai.models():  # noqa: ASYNC110  the door looks every second
                await asyncio.sleep(0.05)

        with pytest.raises(openai.InternalServerError) as refused:
            await ai.whole("completion")

        assert refused.value.status_code == 503
        assert refused.value.response.headers["x-headgate-reason"] == "no_endpoint"
        assert int(refused.value.response.headers["retry-after"]) >= 1

    @pytest.fixture
    async def drained(self, system):
        """No endpoint takes new work, and all are there."""
        await told(system, "drain", "--no-wait")
        yield
        await told(system, "resume")
        await serves(system)

    @pytest.fixture
    async def paused(self, system):
        """Every engine is paused, and says so."""
        for one in system["endpoints"]:
            async with Engine(one["url"]) as engine:
                await engine.post("/pause?mode=keep")
        yield
        for one in system["endpoints"]:
            async with Engine(one["url"]) as engine:
                await engine.post("/resume")
        await serves(system)


async def told(system, word, *more):
    """An operator's word to every endpoint."""
    for one in system["endpoints"]:
        words = [word, one["name"], "--redis", system["redis"], "--pool", system["pool"], *more]
        await asyncio.to_thread(subprocess.run, [HEADGATE, *words], check=True, capture_output=True)


async def serves(system):
    """Return when it answers again."""
    async with (
        patient(lambda: "it does not serve again"),
        openai.AsyncOpenAI(base_url=f"{system['door']}/v1", api_key="any", max_retries=0) as ai,
    ):
        while True:
            with contextlib.suppress(openai.APIStatusError):
                await ai.completions.create(model=MODEL, prompt="x", max_tokens=1)
                return


async def running(system):
    """Requests inside the engines, as these say."""
    count = 0
    for one in system["endpoints"]:
        async with Engine(one["url"]) as engine:
            count += await engine.metric("num_requests_running")
    return count


async def falls_to(wanted, system):
    async with patient(lambda: f"more than {wanted} are running"):
        while await running(system) > wanted:  # noqa: ASYNC110  an engine's gauge has no event
            await asyncio.sleep(0.05)
