"""A dispatcher played by hand: every move a dispatcher makes, one at a time, at the test's word."""

import asyncio
from collections.abc import Callable
from importlib import resources

import msgspec

from dispatcher.streams import dispatch, producer
from dispatcher.streams.connection import PREFIX, Connection, Where
from scheduler import codec
from scheduler.events import Arrived, Assign, Reclaim
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.client import Control, Request
from scheduler.wire.dispatcher import Decision, Job
from scheduler.wire.worker import Beat, Result, Reward, Tokens

FUNCTIONS = resources.files("dispatcher.streams").joinpath("functions.lua").read_text()

POLL_S = 0.01
PATIENCE_S = 20.0


async def until(found: Callable[[], object]):
    """What `found` returns, once that is something."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            result = found()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(POLL_S)


class Hand:
    """The dispatcher of one pool."""

    def __init__(self, redis: Connection, keys: Keys, leader_epoch: int) -> None:
        self.redis, self.keys, self.leader_epoch = redis, keys, leader_epoch
        self.arrived: dict[str, Arrived] = {}

    @classmethod
    async def of(cls, url: str, pool: str) -> "Hand":
        redis = await Connection.connect(Where(url=url))
        keys = Keys("hg", pool)
        await redis.ensure_group(keys.requests, DISPATCHER_GROUP)
        call = dispatch.lead(keys, "hand", ttl_s=600)
        reply = await redis.call(call.function, call.keys, call.args)
        return cls(redis, keys, int(reply[0]))

    async def do(self, call):
        return await self.redis.call(call.function, call.keys, call.args)

    async def beats(self) -> list[Beat]:
        return [codec.decode(Beat, f) for _, f in await self.redis.entries(self.keys.beats)]

    async def ready(self, endpoint: str = "e0", *, after: int = 0) -> Beat:
        """The endpoint's first beat that says ready, of an epoch later than `after`."""

        async def found():
            for beat in await self.beats():
                if beat.endpoint == endpoint and beat.state == "ready" and beat.epoch > after:
                    return beat
            return None

        return await until(found)

    async def enqueue(self, request_id: str, body: dict | bytes, **fields) -> Arrived:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        request = Request(id=request_id, model="emulated", body=raw, **fields)
        await self.do(
            producer.submit(self.keys, request, now=self.redis.now(), waiting_max=0, body_ttl_s=60)
        )
        read = await self.redis.read_group(
            DISPATCHER_GROUP, "hand", [self.keys.requests], count=10, block_s=None
        )
        entry, written = read[self.keys.requests][-1]
        request = codec.decode(Request, written)
        arrived = Arrived(
            request=request, entry=entry, enqueued_at=int(entry.partition("-")[0]) / 1e3
        )
        await self.do(dispatch.accept(self.keys, self.leader_epoch, arrived, None))
        self.arrived[request_id] = arrived
        return arrived

    async def assign(
        self,
        request_id: str,
        epoch: int,
        *,
        attempt: int = 1,
        endpoint: str = "e0",
        enqueued_at: float | None = None,
        **fields,
    ) -> Job:
        arrived = self.arrived[request_id]
        request = arrived.request
        deadline_at = request.deadline_at
        if request.deadline_s is not None:
            deadline_at = arrived.enqueued_at + request.deadline_s
        job = Job(
            id=request_id,
            entry=arrived.entry,
            attempt=attempt,
            epoch=epoch,
            model=request.model,
            path=request.path,
            body=request.body,
            stream=request.stream,
            enqueued_at=arrived.enqueued_at if enqueued_at is None else enqueued_at,
            ttft_s=request.ttft_s,
            tpot_s=request.tpot_s,
            deadline_at=deadline_at,
            decided_at=self.redis.now(),
            features=("x=1",),
            **fields,
        )
        decision = Decision(id=request_id, kind="assigned", endpoint=endpoint)
        command = Assign(endpoint=endpoint, job=job, explain=lambda: decision)
        assert await self.do(dispatch.assign(self.keys, self.leader_epoch, command)) not in (0, -1)
        return job

    async def submit(self, request_id: str, body: dict | bytes, epoch: int, **fields) -> Job:
        """Enqueue and assign at once; fields of the job begin with `job_`."""
        job = {k[4:]: v for k, v in fields.items() if k.startswith("job_")}
        request = {k: v for k, v in fields.items() if not k.startswith("job_")}
        await self.enqueue(request_id, body, **request)
        return await self.assign(request_id, epoch, **job)

    async def assign_until_it_ends(self, request_id: str, epoch: int, *, attempt: int) -> int:
        """Assign it again as often as it is handed back; the attempt that ended it.

        Where an engine counts as hung after less than a second, a busy machine makes a sound one look so.
        """
        while True:
            await self.assign(request_id, epoch, attempt=attempt)

            async def over(attempt: int = attempt) -> bool:
                rewards = await self.rewards(request_id)
                return any(reward.attempt == attempt for reward in rewards)

            await until(over)
            if await self.results(request_id):
                return attempt
            attempt += 1

    async def reclaim(self, request_id: str, *, attempt: int = 1, endpoint: str = "e0") -> int:
        command = Reclaim(
            id=request_id,
            entry=self.arrived[request_id].entry,
            endpoint=endpoint,
            attempt=attempt,
            deadline_at=None,
            decision=Decision(id=request_id, kind="reclaimed"),
        )
        return await self.do(dispatch.reclaim(self.keys, self.leader_epoch, command))

    async def read_again(self, request_id: str) -> int:
        """Write down once more that it is read, as whoever takes over does; 0: there is nothing left to do for it."""
        call = dispatch.accept(self.keys, self.leader_epoch, self.arrived[request_id], None)
        return await self.do(call)

    async def pending(self, endpoint: str = "e0") -> int:
        """How many entries somebody still has to see to, of requests and of jobs."""
        groups = ((self.keys.requests, DISPATCHER_GROUP), (self.keys.jobs(endpoint), WORKER_GROUP))
        found = [await self.redis.command("XPENDING", *one) for one in groups]
        return sum(one["pending"] for one in found)

    async def refuse_to(self, move: str) -> None:
        """Have Redis refuse a move, as one without memory does, until it is told to `relent` or our functions are loaded."""
        registered = f"redis.register_function('{PREFIX}{move}', {move})"
        refusing = registered.replace(
            f" {move})", f" function() return {{err = 'OOM {move}'}} end)"
        )
        assert registered in FUNCTIONS
        code = FUNCTIONS.replace(registered, refusing)
        await self.redis.command("FUNCTION", "LOAD", "REPLACE", code)

    async def relent(self) -> None:
        """The functions as they are."""
        await self.redis.command("FUNCTION", "LOAD", "REPLACE", FUNCTIONS)

    async def cancel(self, request_id: str, *, endpoint: str = "e0") -> None:
        """As the dispatcher does: the tombstone, and a word to the worker."""
        await self.do(producer.cancel(self.keys, request_id))
        word = codec.encode(Control(action="cancel", id=request_id, reason="not wanted any more"))
        await self.redis.add(self.keys.jobs(endpoint), word)

    async def results(self, request_id: str) -> list[Result]:
        found = [codec.decode(Result, f) for _, f in await self.redis.entries(self.keys.results)]
        return [result for result in found if result.id == request_id]

    async def result(self, request_id: str) -> Result:
        [only] = await until(lambda: self.results(request_id))
        return only

    async def rewards(self, request_id: str) -> list[Reward]:
        found = [codec.decode(Reward, f) for _, f in await self.redis.entries(self.keys.rewards)]
        return [reward for reward in found if reward.id == request_id]

    async def reward(self, request_id: str, n: int = 1) -> Reward:
        """The n-th reward of the request."""

        async def found():
            rewards = await self.rewards(request_id)
            return rewards[n - 1] if len(rewards) >= n else None

        return await until(found)

    async def tokens(self, request_id: str) -> list[Tokens]:
        entries = await self.redis.entries(self.keys.tokens(request_id))
        return [codec.decode(Tokens, fields) for _, fields in entries]

    async def text(self, request_id: str) -> str:
        return "".join(part.text for part in await self.tokens(request_id))
