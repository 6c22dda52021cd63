"""The two sides of a bench, each in a process of its own: whoever asks, and endpoints that answer at once.

    python tests/bench/parts.py endpoints URL POOL COUNT     answers jobs; beats
    python tests/bench/parts.py asker URL POOL               takes one line of JSON a run, answers with one
    python tests/bench/parts.py gone URL POOL COUNT          leaves so many requests read and unfinished behind

Both use the real moves over the real connection. What they add beside them is as little as can be, so that what is
measured is the dispatcher: an answer's result and reward are encoded once and only what differs is filled in.
"""

import asyncio
import json
import os
import sys
import time
from itertools import count

import uvloop

from dispatcher.streams import producer, sidecar
from dispatcher.streams.connection import Call, Connection, Where
from dispatcher.streams.producer import packed_fields
from dispatcher.streams.sidecar import Held
from scheduler import codec
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.client import Request
from scheduler.wire.dispatcher import Job
from scheduler.wire.worker import Beat, Result, Reward

SUBMIT_MAX = 100
"Requests enqueued in one round trip."

BODY = json.dumps(
    {"messages": [{"role": "user", "content": "why is the sky blue? " * 20}], "max_tokens": 2}
).encode()

GROUPS = 50
"Different prompts' beginnings; the first of a request's prefix blocks tell them apart."


def main() -> None:
    role, url, pool, *rest = sys.argv[1:]
    uvloop.run(
        {"endpoints": endpoints, "asker": asker, "gone": gone}[role](url, Keys("hg", pool), *rest)
    )


def say(message) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


# Endpoints


async def endpoints(url: str, keys: Keys, number: str) -> None:
    redis = await Connection.connect(Where(url=url))
    players = [Endpoint(redis, keys, f"e{i}") for i in range(int(number))]
    for player in players:
        await player.join()
    ears = await lines()
    seen: list[float] = []
    beating = asyncio.create_task(beat(players))
    answering = asyncio.create_task(answer(redis, keys, players, seen))
    say({"ready": True})
    while await ears.readline():
        say({"jobs": len(seen), "waited_ms": seen})
        seen.clear()
        assert not answering.done(), answering.exception()
        assert not beating.done(), beating.exception()
    await asyncio.to_thread(os._exit, 0)


async def beat(players) -> None:
    while True:
        for player in players:
            await player.beat()
            await asyncio.sleep(1 / len(players))


async def answer(redis: Connection, keys: Keys, players, seen: list[float]) -> None:
    """One read over all streams: an endpoint each would only cost this process more."""
    by_stream = {keys.jobs(player.name): player for player in players}
    while True:
        read = await redis.read_group(WORKER_GROUP, "played", list(by_stream), count=256, block_s=1)
        now = time.time()
        calls = []
        for stream, entries in read.items():
            for entry, fields in entries:
                sent_at = fields.get(b"traceparent")
                if sent_at:
                    seen.append((now - int(sent_at) / 1e9) * 1e3)
                calls += by_stream[stream].ending(entry, fields, now)
        for reply in await redis.batch(calls):
            assert reply == 1, reply


class Endpoint:
    """One worker, without an engine."""

    def __init__(self, redis: Connection, keys: Keys, name: str) -> None:
        self.redis, self.keys, self.name, self.epoch = redis, keys, name, 0

    async def join(self) -> None:
        await self.redis.ensure_group(self.keys.jobs(self.name), WORKER_GROUP)
        call = sidecar.join(self.keys, self.name, "played")
        self.epoch = int(await self.redis.call(call.function, call.keys, call.args))
        await self.beat()
        job = Job(
            id="-",
            entry="0-0",
            attempt=1,
            epoch=self.epoch,
            model="m",
            path="/",
            enqueued_at=0,
            decided_at=0,
        )
        result = Result(
            id="-", outcome="completed", status=200, endpoint=self.name, attempt=1, output_tokens=5
        )
        reward = Reward(
            id="-", endpoint=self.name, epoch=self.epoch, attempt=1, outcome="completed", model="m", hardware="a100",
            decided_at=0.0, prefill_s=0.0005, ttft_s=0.001, tpot_s=0.0002, prompt_tokens=140, output_tokens=5, cached_tokens=0,
        )  # fmt: skip
        held = Held(self.name, job, "0-0")
        self.calls = (
            sidecar.finish(self.keys, held, result, pieces=0, ttl_s=60),
            sidecar.settle(self.keys, held, reward),
        )
        self.result, self.reward = codec.encode(result), codec.encode(reward)

    async def beat(self) -> None:
        message = Beat(
            endpoint=self.name, epoch=self.epoch, models=("m",), hardware="a100", max_num_seqs=256,
            kv_tokens=4_000_000, block_tokens=16, max_model_len=131_072,
        )  # fmt: skip
        call = sidecar.beat(self.keys, message, lease_s=3)
        assert await self.redis.call(call.function, call.keys, call.args) == 1

    def ending(self, entry: str, fields: dict[bytes, bytes], now: float) -> tuple[Call, Call]:
        """`sidecar.finish` and `sidecar.settle` of this job, from those made at the start."""
        keys = self.keys
        request_id = fields[b"id"].decode()
        moment = f"{now * 1e3:.3f}"
        same = {name: fields[name.encode()].decode() for name in ("id", "enqueued_at")}
        result = self.result | same | {"finished_at": moment}
        reward = self.reward | same | {
            "decided_at": fields[b"decided_at"],
            "admitted_at": moment,
            "first_token_at": moment,
            "finished_at": moment,
            "predicted_ms": fields[b"prefill_ms"],
            "cached_tokens": fields[b"cached_tokens"],
            "features": fields[b"features"],
        }  # fmt: skip
        finish, settle = self.calls
        finished, settled = list(finish.args), list(settle.args)
        finished[2] = settled[5] = fields[b"entry"].decode()
        finished[6], settled[3], settled[8] = packed_fields(result), entry, packed_fields(reward)
        names = (
            keys.request(request_id),
            fields[b"reply_to"].decode() or keys.results,
            keys.tokens(request_id),
            *finish.keys[3:],
        )
        rest = (names[0], *settle.keys[1:3], keys.body(request_id), settle.keys[4])
        return Call("finish", names, finished), Call("settle", rest, settled)


# A dispatcher that died


async def gone(url: str, keys: Keys, number: str) -> None:
    redis = await Connection.connect(Where(url=url))
    await redis.ensure_group(keys.requests, DISPATCHER_GROUP)
    for at in range(0, int(number), SUBMIT_MAX):
        await redis.batch([asking(keys, at + i, {}) for i in range(SUBMIT_MAX)])
        await redis.read_group(
            DISPATCHER_GROUP, "gone", [keys.requests], count=SUBMIT_MAX, block_s=None
        )
    await redis.close()
    say({"ready": True})


# Whoever asks


async def asker(url: str, keys: Keys) -> None:
    redis = await Connection.connect(Where(url=url))
    await redis.ensure_group(keys.requests, DISPATCHER_GROUP)
    numbers = count()
    ears = await lines()
    say({"ready": True})
    while line := await ears.readline():
        wanted = json.loads(line)
        began_at, cpu_at = time.perf_counter(), time.process_time()
        waited_ms = await ask(redis, keys, numbers, **wanted)
        say({
            "took_s": time.perf_counter() - began_at,
            "cpu_s": time.process_time() - cpu_at,
            "waited_ms": waited_ms,
        })  # fmt: skip
    await redis.close()


async def ask(
    redis: Connection, keys: Keys, numbers, *, requests: int, window: int = 0, rate: float = 0
) -> list[float]:
    """Enqueue so many, at most `window` unanswered or `rate` a second; how long each waited, milliseconds."""
    asked: dict[bytes, float] = {}
    waited_ms: list[float] = []
    room, done = asyncio.Semaphore(window or requests), asyncio.Event()
    after = (await redis.newest(keys.results, after="0", count=1) or [("0-0", {})])[-1][0]

    async def listen(after: str) -> None:
        while len(waited_ms) < requests:
            read = await redis.read({keys.results: after}, count=1000, block_s=1)
            now = time.perf_counter()
            for entry, fields in read.get(keys.results, []):
                after = entry
                assert fields[b"outcome"] == b"completed", fields
                waited_ms.append((now - asked.pop(fields[b"id"])) * 1e3)
                room.release()
        done.set()

    listening = asyncio.create_task(listen(after))
    began_at, sent = time.perf_counter(), 0
    while sent < requests:
        if rate:
            await asyncio.sleep(began_at + sent / rate - time.perf_counter())
        calls = []
        while sent < requests and len(calls) < SUBMIT_MAX:
            if calls and (room.locked() or (rate and began_at + sent / rate > time.perf_counter())):
                break
            await room.acquire()
            calls.append(asking(keys, next(numbers), asked))
            sent += 1
        await redis.batch(calls)
    await asyncio.gather(done.wait(), listening)
    return waited_ms


def asking(keys: Keys, number: int, asked: dict[bytes, float]) -> Call:
    request = Request(
        id=f"r{number}", model="m", body=BODY, ttft_s=5.0, prompt_tokens=140,
        blocks=tuple(f"{number % GROUPS:x}.{i:x}" for i in range(8)), traceparent=str(time.time_ns()),
    )  # fmt: skip
    asked[request.id.encode()] = time.perf_counter()
    return producer.submit(keys, request, now=time.time(), waiting_max=0, body_ttl_s=60)


if __name__ == "__main__":
    main()
