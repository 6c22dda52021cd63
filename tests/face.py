"""Just enough HTTP to see what an engine says, whichever it is."""

import asyncio
import contextlib
import json

import aiohttp
import pytest

MODEL = "emulated"

USAGE = {"include_usage": True}
ENDLESS = {"max_tokens": 20_000, "ignore_eos": True}


PATIENCE_S = 20.0
"What a server that does as it should may take on a busy machine."


@contextlib.asynccontextmanager
async def patient(what):
    """A wait in vain says what it waited for."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield
    except TimeoutError:
        pytest.fail(what())


class Client:
    """A client of one server."""

    def __init__(self, url):
        self.url = url

    async def __aenter__(self):
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        return self

    async def __aexit__(self, *_):
        await self.session.close()

    async def get(self, path):
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()

    async def post(self, path, body=None, **headers):
        async with self.session.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.text()

    async def ask(self, path="/v1/completions", headers=None, **body):
        """A whole answer."""
        status, text = await self.post(path, {"model": MODEL, **body}, **(headers or {}))
        return Reply(status, [json.loads(text)] if text.startswith("{") else [], text)

    async def stream(self, path="/v1/completions", headers=None, on_chunk=None, **body):
        body = {"model": MODEL, "stream": True, **body}
        reply = Reply(0, [], "")
        url = self.url + path
        async with self.session.post(url, json=body, headers=headers) as response:
            reply.status = response.status
            async for line in response.content:
                reply.text += line.decode()
                if line.startswith(b"data: {"):
                    reply.chunks.append(json.loads(line[6:]))
                    if on_chunk is not None:
                        on_chunk(reply)
        return reply

    async def begun(self, **body):
        """A stream under way: its task, once it has said something."""
        has_begun = asyncio.Event()
        task = asyncio.create_task(self.stream(on_chunk=lambda _: has_begun.set(), **body))
        await has_begun.wait()
        return task

    async def metric(self, name, **labels):
        _, text = await self.get("/metrics")
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(f"vllm:{name}{{") and all(label in line for label in wanted)
        )

    async def until(self, name, value, **labels):
        """Wait until a metric says so."""
        async with patient(lambda: f"{name} is {found}, {value} wanted"):
            while (found := await self.metric(name, **labels)) != value:  # noqa: ASYNC110  a server has no events
                await asyncio.sleep(0.005)

    async def until_load(self, value):
        """Wait until so many requests are inside the server."""
        async with patient(lambda: f"load is {found}, {value} wanted"):
            while (found := json.loads((await self.get("/load"))[1])["server_load"]) != value:  # noqa: ASYNC110  a server has no events
                await asyncio.sleep(0.005)

    async def fault(self, kind, **fields):
        status, text = await self.post("/emulator/fault", {"kind": kind, **fields})
        assert status == 200, text


class Reply:
    def __init__(self, status, chunks, text):
        self.status = status
        self.chunks = chunks
        self.text = text

    @property
    def choices(self):
        return [choice for chunk in self.chunks for choice in chunk.get("choices", [])]

    @property
    def said(self):
        parts = [
            choice.get("text")
            or choice.get("delta", {}).get("content")
            or choice.get("message", {}).get("content")
            or ""
            for choice in self.choices
        ]
        return "".join(parts)

    @property
    def ids(self):
        return [token for choice in self.choices for token in choice.get("token_ids") or []]

    @property
    def finish_reason(self):
        reasons = [choice["finish_reason"] for choice in self.choices if choice["finish_reason"]]
        assert len(reasons) <= 1
        return reasons[0] if reasons else None

    @property
    def usage(self):
        return self.chunks[-1].get("usage")

    @property
    def error(self):
        return next((chunk["error"] for chunk in self.chunks if "error" in chunk), None)

    @property
    def is_done(self):
        return self.text.endswith("data: [DONE]\n\n")


async def cancelled(*tasks):
    """Let these clients leave."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
