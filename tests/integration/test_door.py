"""The door on a whole system, judged by the official `openai` client and by the engine's own answers."""

import asyncio
import json
import os
import signal
from pathlib import Path

import aiohttp
import openai
import pytest
from stacks import up

from dispatcher.client import Client


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """`headgate up` with two emulated engines, for all tests of this file."""
    words = ("--emulate", "2", "--profiles", "h100", "--model", "llama")
    with up(tmp_path_factory.mktemp("up"), *words) as ready:
        yield ready


@pytest.fixture
async def ai(system):
    """The official client; it tries nothing twice."""
    async with openai.AsyncOpenAI(
        base_url=f"{system['door']}/v1", api_key="any", max_retries=0, timeout=30
    ) as client:
        yield client


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


def chat(text="tell me of rivers", output_tokens=8, **more):
    """A chat whose emulated answer has a known length."""
    return {
        "model": "llama",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 2 * output_tokens,
        "extra_body": {"vllm_xargs": {"output_tokens": output_tokens}},
    } | more


def completion(text="rivers", output_tokens=8, **more):
    asked = chat(text, output_tokens) | {"prompt": text} | more
    del asked["messages"]
    return asked


def raw(asked):
    return {k: v for k, v in asked.items() if k != "extra_body"} | asked.get("extra_body", {})


def logged(system):
    return Path(system["logs"], "door.log").read_text()


async def sse(http, url, body):
    """The events of a stream, parsed, and the marks among them."""
    async with http.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        lines = [line async for line in answer.content if line.strip()]
    return [
        line.strip().decode() if b"[DONE]" in line else json.loads(line.removeprefix(b"data: "))
        for line in lines
    ]


async def running(http, system):
    """Requests in all engines' batches, as the engines say."""
    found = 0.0
    for engine in system["endpoints"]:
        async with http.get(f"{engine['url']}/metrics") as page:
            lines = (await page.text()).splitlines()
        found += sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("vllm:num_requests_running")
        )
    return found


async def becomes(wanted, ask):
    async with asyncio.timeout(20):
        while await ask() != wanted:  # noqa: ASYNC110  an engine's gauge has no event
            await asyncio.sleep(0.02)


def text_of(chunk):
    choice = chunk["choices"][0] if chunk["choices"] else {}
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


class TestAnswers:
    async def test_chat(self, ai):
        """The engine's answer as it stands, and in the headers who gave it."""
        got = await ai.chat.completions.with_raw_response.create(**chat())

        answer = got.parse()
        assert answer.choices[0].message.content
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 8)
        assert got.headers["x-headgate-endpoint"].startswith("h100-")
        assert got.headers["x-headgate-attempt"] == "1"
        assert got.headers["x-request-id"]

    async def test_completions(self, ai):
        """The older face, and vLLM's own fields."""
        answer = await ai.completions.create(
            model="llama", prompt="rivers", max_tokens=12, extra_body={"ignore_eos": True}
        )

        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 12)

    @pytest.mark.parametrize("kind", [chat, completion])
    async def test_a_stream_is_the_same_answer(self, ai, kind):
        """Role first, words, a reason, the usage at the end; joined it is what the whole answer says."""
        face = ai.chat.completions if kind is chat else ai.completions
        whole = await face.create(**kind(output_tokens=30))
        stream = await face.create(
            **kind(output_tokens=30), stream=True, stream_options={"include_usage": True}
        )

        chunks = [chunk.model_dump() async for chunk in stream]

        said = whole.choices[0].model_dump()
        assert "".join(map(text_of, chunks)) == (said.get("text") or said["message"]["content"])
        assert len(chunks) > 4
        assert [c["choices"][0]["finish_reason"] for c in chunks[-3:-1]] == [None, "stop"]
        assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 30)
        if kind is chat:
            assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"

    @pytest.mark.parametrize("kind", [chat, completion])
    async def test_chunks_look_like_the_engines(self, system, http, kind):
        """The same fields as the engine behind it sends, chunk kind by chunk kind, and the same words."""
        path = "/v1/chat/completions" if kind is chat else "/v1/completions"
        body = raw(kind(stream=True, stream_options={"include_usage": True}))
        engine = await sse(http, system["endpoints"][0]["url"] + path, body)
        door = await sse(http, system["door"] + path, body)

        def shape(events):
            *chunks, done = events
            kinds = {
                (
                    tuple(sorted(chunk)),
                    tuple(tuple(sorted(choice)) for choice in chunk["choices"]),
                    chunk["object"],
                    chunk["model"],
                    "usage" in chunk,
                )
                for chunk in chunks
            }
            return kinds, done, "".join(map(text_of, chunks)), chunks[-1]["usage"].keys()

        assert shape(door) == shape(engine)

    async def test_models(self, ai):
        """What the living endpoints say they serve, and how long a context."""
        [model] = (await ai.models.list()).data

        assert (model.id, model.owned_by) == ("llama", "headgate")
        assert model.max_model_len > 1000
        assert (await ai.models.retrieve("llama")).id == "llama"


class TestRefused:
    @pytest.mark.parametrize(
        ("more", "error", "words"),
        [
            pytest.param({"model": "nope"}, openai.NotFoundError, "does not exist", id="model"),
            pytest.param({"messages": []}, openai.BadRequestError, "'messages'", id="messages"),
            pytest.param(
                {"max_tokens": 10**9},
                openai.BadRequestError,
                "max_model_len",
                id="the engine's own",
            ),
        ],
    )
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_as_the_client_knows_it(self, ai, more, error, words, is_stream):
        """The error's own type and what was wrong, whether or not a stream was asked for."""
        with pytest.raises(error, match=words) as refused:
            await ai.chat.completions.create(**(chat(stream=is_stream) | more))

        assert refused.value.response.headers["x-headgate-reason"]

    async def test_no_json_and_no_route(self, system, http):
        """Errors of the HTTP itself have the same shape."""
        url = system["door"]
        async with http.post(f"{url}/v1/completions", data=b'{"model":') as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (400, 400)
        async with http.get(f"{url}/v1/nothing") as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["type"]) == (404, "NotFoundError")
            assert error["message"].startswith("GET /v1/nothing is not served, wanted one of POST")
        async with http.get(f"{url}/v1/completions") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (405, 405)

    @pytest.mark.parametrize(
        ("head", "said"),
        [
            pytest.param(b"Content-Encoding: gzip", b"cannot be read: ", id="no gzip"),
            pytest.param(b"x-headgate-tenant: \xe9", b"wanted UTF-8", id="no text"),
            pytest.param(b"x-request-id: a\x00b", b"Invalid header value", id="no header"),
        ],
    )
    async def test_what_is_no_http_is_the_clients_fault(self, system, head, said):
        """400 and a reason, and the log holds a line of it at most: no traceback for whoever knocks."""
        before = logged(system)
        body = json.dumps(raw(chat())).encode()
        lines = (b"POST /v1/chat/completions HTTP/1.1", b"Host: door", b"Connection: close", head)
        length = b"Content-Length: %d" % len(body)
        reader, writer = await asyncio.open_connection(*system["door"][7:].split(":"))

        writer.write(b"\r\n".join((*lines, length, b"", body)))

        answer = await reader.read()
        writer.close()
        assert answer.split(b" ")[1] == b"400"
        assert said in answer
        assert logged(system).removeprefix(before).count("\n") <= 1

    async def test_expired(self, ai):
        """Before the first word, or without a stream: the status tells."""
        asked = chat(output_tokens=5000, extra_headers={"x-headgate-deadline-ms": "50"})

        with pytest.raises(openai.InternalServerError, match="deadline") as refused:
            await ai.chat.completions.create(**asked)

        assert refused.value.status_code == 504

    async def test_expired_in_mid_stream(self, ai):
        """After the first word the error is a chunk, which the client raises."""
        asked = chat(output_tokens=5000, extra_headers={"x-headgate-deadline-ms": "600"})
        stream = await ai.chat.completions.create(**asked, stream=True)

        words = []

        async def listen():
            async for chunk in stream:
                words.append(chunk.choices[0].delta.content)  # noqa: PERF401  kept when it raises

        with pytest.raises(openai.APIError, match="deadline"):
            await listen()
        assert len(words) > 1


class TestGone:
    async def test_closing_the_stream_frees_the_engine(self, ai, system, http):
        """The engine's own gauge falls to 0 although 20000 tokens were asked for."""
        stream = await ai.chat.completions.create(**chat(output_tokens=20_000), stream=True)
        await anext(aiter(stream))
        assert await running(http, system) == 1

        await stream.close()

        await becomes(0, lambda: running(http, system))

    async def test_so_does_giving_up_the_wait(self, ai, system, http):
        """Without a stream the broken connection alone says it."""
        asking = asyncio.create_task(ai.chat.completions.create(**chat(output_tokens=20_000)))
        await becomes(1, lambda: running(http, system))

        asking.cancel()

        await becomes(0, lambda: running(http, system))

    async def test_unless_it_shall_go_on(self, ai, system, http):
        """Asked for again under its name, the answer is there, made once."""
        asked = chat(
            output_tokens=60,
            extra_headers={"x-request-id": "later", "x-headgate-on-disconnect": "continue"},
        )
        stream = await ai.chat.completions.create(**asked, stream=True)
        await anext(aiter(stream))
        await stream.close()

        answer = await ai.chat.completions.create(**asked)

        assert answer.usage.completion_tokens == 60
        async with Client(redis=system["redis"]) as client:
            assert (await client.status("later")).attempt == 1


class TestOnce:
    async def test_one_name_is_one_request(self, ai, system):
        """Two at the same time and one after them get the same answer; it ran once."""
        asked = chat(output_tokens=20, extra_headers={"x-request-id": "twin"})

        two = await asyncio.gather(*(ai.chat.completions.create(**asked) for _ in range(2)))
        third = await ai.chat.completions.create(**asked)

        assert {answer.id for answer in (*two, third)} == {"chatcmpl-twin-1"}

    async def test_a_refused_name_may_try_again(self, ai):
        """A retry under the same id is no echo of the refusal."""
        named = {"x-request-id": "again"}
        slow = chat(output_tokens=5000, extra_headers=named | {"x-headgate-deadline-ms": "50"})
        with pytest.raises(openai.InternalServerError):
            await ai.chat.completions.create(**slow)

        got = await ai.chat.completions.with_raw_response.create(**chat(extra_headers=named))

        assert got.headers["x-request-id"] == "again"
        assert got.headers["x-headgate-request"] == "again.2"


class TestDeath:
    async def test_a_stream_outlives_its_worker(self, ai, system):
        """Killed in mid-stream, started again; the client sees a pause, every word, and each once."""
        whole = await ai.chat.completions.create(**chat("of deltas", output_tokens=250))
        stream = await ai.chat.completions.create(
            **chat("of deltas", output_tokens=250), stream=True
        )
        words = [(await anext(aiter(stream))).choices[0].delta.content]

        os.kill(system["pids"]["worker-0"], signal.SIGKILL)
        async for chunk in stream:
            words.append(chunk.choices[0].delta.content or "")  # noqa: PERF401

        assert "".join(words) == whole.choices[0].message.content
