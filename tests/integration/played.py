"""Both servers' parts played by a short loop through the real moves: for tests of whoever stands outside."""

import asyncio
import contextlib
import json

from dispatcher.streams import dispatch, sidecar
from dispatcher.streams.connection import Connection, Where
from dispatcher.streams.sidecar import Held
from scheduler import codec
from scheduler.errors import StreamError
from scheduler.events import Arrived, Assign
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.client import Request
from scheduler.wire.dispatcher import Decision, Job
from scheduler.wire.worker import Result, Reward, Tokens

ENDPOINT = "a100-0"


class Played:
    """Answers every request with its own words, one piece a word.

    A request whose tenant is `hold` is assigned and kept until `release`; `fail` ends as failed and dead.
    """

    def __init__(self, connection, keys):
        self.connection, self.keys = connection, keys
        self.held = []
        self.is_holding = asyncio.Event()

    @classmethod
    async def start(cls, url, pool):
        connection = await Connection.connect(Where(url=url))
        keys = Keys("hg", pool)
        await connection.ensure_group(keys.requests, DISPATCHER_GROUP)
        await connection.ensure_group(keys.jobs(ENDPOINT), WORKER_GROUP)
        self = cls(connection, keys)
        self.epoch = int((await self.do(dispatch.lead(keys, "d1", ttl_s=60)))[0])
        return self

    async def do(self, call):
        return await self.connection.call(call.function, call.keys, call.args)

    async def run(self):
        while True:
            with contextlib.suppress(StreamError):  # a test may cut every connection
                await self.turn(block_s=1.0)

    async def holds(self, n):
        """Return when it holds this many."""
        while len(self.held) < n:
            self.is_holding.clear()
            await self.is_holding.wait()

    async def turn(self, block_s=None):
        """Read what came and carry it to its end; how many entries."""
        read = await self.connection.read_group(
            DISPATCHER_GROUP, "d1", [self.keys.requests], count=100, block_s=block_s
        )
        entries = read.get(self.keys.requests, [])
        for entry, fields in entries:
            held = await self.assigned(entry, fields)
            if held is None:
                continue
            if held.job.tenant == "hold":
                self.held.append(held)
                self.is_holding.set()
            else:
                await self.finish(held)
        return len(entries)

    async def assigned(self, entry, fields):
        request = codec.decode(Request, fields)
        arrived = Arrived(request=request, entry=entry, enqueued_at=0.0)
        if await self.do(dispatch.accept(self.keys, self.epoch, arrived, None)) != 1:
            return None
        body = (
            request.body or await self.connection.command("GET", self.keys.body(request.id)) or b""
        )
        job = Job(
            id=request.id,
            entry=entry,
            attempt=1,
            epoch=1,
            model=request.model,
            path=request.path,
            body=body,
            enqueued_at=0.0,
            decided_at=0.0,
            stream=request.stream,
            tenant=request.tenant,
            reply_to=request.reply_to,
        )
        decision = Decision(
            id=job.id,
            kind="assigned",
            at=self.connection.now(),
            attempt=1,
            endpoint=ENDPOINT,
            prefill_s=0.02,
            candidates=(f"{ENDPOINT}=0.020", "l40s-0=0.080"),
        )
        command = Assign(endpoint=ENDPOINT, job=job, explain=lambda: decision)
        job_entry = await self.do(dispatch.assign(self.keys, self.epoch, command))
        await self.do(dispatch.notes(self.keys, self.epoch, [decision]))
        held = Held(ENDPOINT, job, job_entry.decode())
        jobs = self.keys.jobs(ENDPOINT)
        await self.connection.read_group(WORKER_GROUP, "played", [jobs], count=1, block_s=None)
        await self.do(sidecar.start(self.keys, held))
        return held

    async def say(self, held, index, text):
        tokens = Tokens(attempt=held.job.attempt, index=index, pieces=1, text=text)
        await self.do(sidecar.tokens(self.keys, held, tokens, ttl_s=60))

    async def finish(self, held, outcome=None, pieces=None):
        """Its end, and before it its words, one a piece, unless so many pieces were said already."""
        body = json.loads(held.job.body)
        text = body.get("prompt") or body["messages"][-1]["content"]
        words = [f"{word} " for word in text.split()]
        if held.job.stream and pieces is None:
            for index, word in enumerate(words):
                await self.say(held, index, word)
            pieces = len(words)
        outcome = outcome or ("failed" if held.job.tenant == "fail" else "completed")
        answer = {"choices": [{"text": "".join(words)}], "usage": {"completion_tokens": len(words)}}
        result = Result(
            id=held.job.id,
            outcome=outcome,
            reason="" if outcome == "completed" else "as the test wants",
            status=200 if outcome == "completed" else 500,
            endpoint=held.endpoint,
            attempt=1,
            ttft_s=0.25,
            finished_at=self.connection.now(),
            body=json.dumps(answer).encode() if outcome == "completed" else b"",
        )
        reward = Reward(id=held.job.id, endpoint=ENDPOINT, epoch=1, attempt=1, outcome=outcome)
        await self.do(
            sidecar.finish(
                self.keys,
                held,
                result,
                pieces=pieces or 0,
                ttl_s=60,
                is_dead=outcome == "failed",
            )
        )
        await self.do(sidecar.settle(self.keys, held, reward, is_dead=outcome == "failed"))

    async def close(self):
        await self.connection.close()
