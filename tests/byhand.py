"""A worker played by hand: it joins, beats, and does with its jobs what the test says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from dispatcher.streams import sidecar
from dispatcher.streams.connection import Call, Connection, Entry
from dispatcher.streams.sidecar import Held
from scheduler import codec
from scheduler.keys import WORKER_GROUP, Keys
from scheduler.wire.client import Control
from scheduler.wire.dispatcher import Job
from scheduler.wire.worker import Beat, Result, Reward

BEAT_S = 0.2


class PlayedWorker:
    """One endpoint's worker, without an engine."""

    def __init__(self, redis: Connection, keys: Keys, endpoint: str = "a100-0") -> None:
        self.redis = redis
        self.keys = keys
        self.endpoint = endpoint
        self.epoch = 0
        self.aborted: list[str] = []
        self.started: list[str] = []

    async def join(self) -> None:
        await self.redis.ensure_group(self.keys.jobs(self.endpoint), WORKER_GROUP)
        self.epoch = int(await self._do(sidecar.join(self.keys, self.endpoint, "played")))
        await self.beat()

    async def beat(self, **fields) -> object:
        message = Beat(
            endpoint=self.endpoint,
            epoch=self.epoch,
            models=("llama",),
            hardware="a100",
            max_num_seqs=64,
            kv_tokens=400_000,
            block_tokens=16,
            max_model_len=32_768,
            **fields,
        )
        return await self._do(sidecar.beat(self.keys, message, lease_s=3))

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator["PlayedWorker"]:
        """Alive while the block runs."""
        await self.join()

        async def for_ever():
            while True:
                await asyncio.sleep(BEAT_S)
                with contextlib.suppress(Exception):
                    await self.beat()

        task = asyncio.create_task(for_ever())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def jobs(self, count: int = 1, *, limit_s: float = 10) -> list[Held]:
        """The next jobs, once there are so many."""
        found: list[Held] = []
        async with asyncio.timeout(limit_s):
            while len(found) < count:
                found += await self.pull(block_s=1)
        return found

    async def pull(self, *, block_s: float | None = 1) -> list[Held]:
        stream = self.keys.jobs(self.endpoint)
        read = await self.redis.read_group(
            WORKER_GROUP, "played", [stream], count=256, block_s=block_s
        )
        entries = read.get(stream, [])
        for entry, fields in entries:
            if b"action" in fields:
                self.aborted.append(codec.decode(Control, fields).id)
                await self.redis.command("XACK", stream, WORKER_GROUP, entry)
        return self.held(entries)

    def held(self, entries: Sequence[Entry]) -> list[Held]:
        """The jobs among these entries of its stream."""
        return [
            Held(self.endpoint, codec.decode(Job, fields), entry)
            for entry, fields in entries
            if b"action" not in fields
        ]

    async def finish(self, held: Sequence[Held], outcome: str = "completed") -> list[object]:
        """The replies to the ends; what follows each of them is done as well."""
        ends = await self.redis.batch([self.finishing(one, outcome) for one in held])
        await self.redis.batch([self.settling(one, outcome) for one in held])
        return ends

    def finishing(self, held: Held, outcome: str = "completed") -> Call:
        job = held.job
        result = Result(id=job.id, outcome=outcome, endpoint=self.endpoint, attempt=job.attempt)
        return sidecar.finish(self.keys, held, result, pieces=0, ttl_s=60)

    def settling(self, held: Held, outcome: str = "completed") -> Call:
        return sidecar.settle(self.keys, held, self.reward(held, outcome, self.redis.now()))

    async def hand_back(self, held: Held) -> object:
        reward = self.reward(held, "returned", self.redis.now())
        return await self._do(sidecar.hand_back(self.keys, held, reward))

    def reward(self, held: Held, outcome: str, now: float) -> Reward:
        job = held.job
        return Reward(
            id=job.id,
            endpoint=self.endpoint,
            epoch=self.epoch,
            attempt=job.attempt,
            outcome=outcome,
            model=job.model,
            hardware="a100",
            decided_at=job.decided_at,
            admitted_at=job.decided_at,
            first_token_at=now,
            finished_at=now,
            enqueued_at=job.enqueued_at,
            prefill_s=0.01,
            ttft_s=now - job.enqueued_at,
            prompt_tokens=10,
            output_tokens=5,
            cached_tokens=0,
            features=job.features,
        )

    async def _do(self, call: Call) -> object:
        return await self.redis.call(call.function, call.keys, call.args)
