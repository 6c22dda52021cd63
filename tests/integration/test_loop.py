"""The whole dispatcher against a real Redis, with the worker played by hand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from byhand import PlayedWorker
from hand import until
from structlog.testing import capture_logs

from dispatcher import glance, loop
from dispatcher.local import Server
from dispatcher.node import Node
from dispatcher.streams import producer, sidecar
from dispatcher.streams.connection import Connection, Where
from dispatcher.upkeep import Upkeep
from scheduler.errors import SettingsError, StreamError
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.settings import LeaseSettings, LoopSettings, Settings
from scheduler.wire.client import Request
from scheduler.wire.worker import Result

LIMIT_S = 10
"Nothing here takes longer on any machine; a test that does has hung."


@pytest.fixture
def keys(pool: str) -> Keys:
    return Keys("hg", pool)


@pytest.fixture
def settings(pool: str) -> Settings:
    return Settings(
        pool=pool,
        lease=LeaseSettings(leader_s=0.6, worker_s=1.0, beat_s=0.2),
        loop=LoopSettings(snapshot_every_s=0.2),
    )


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Connection]:
    connection = await Connection.connect(Where(url=redis_url))
    yield connection
    await connection.close()


@contextlib.asynccontextmanager
async def dispatching(redis_url, settings, name="d1"):
    """A dispatcher that runs while the block does."""
    connection = await Connection.connect(Where(url=redis_url))
    node = Node(connection, settings, name=name)
    task = asyncio.create_task(node.run())
    try:
        yield node
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await connection.close()


async def enqueue(redis, keys, request_id, **fields):
    request = Request(id=request_id, model="llama", body=b"{}", **fields)
    call = producer.submit(keys, request, now=redis.now(), waiting_max=0, body_ttl_s=60)
    reply = await redis.call(call.function, call.keys, call.args)
    return reply[1].decode()


async def results(redis, keys, count, stream=None):
    """The pool's terminal records by id, once there are so many."""
    stream = stream or keys.results
    found, after = [], "0-0"
    async with asyncio.timeout(LIMIT_S):
        while len(found) < count:
            read = await redis.read({stream: after}, count=1000, block_s=1)
            found += read.get(stream, [])
            after = found[-1][0] if found else after
    assert len(found) == count, f"{len(found)} terminal records, wanted {count}"
    return {fields[b"id"].decode(): fields[b"outcome"].decode() for _, fields in found}


async def decided(redis, keys, count):
    """Return once so many decisions are logged."""
    async with asyncio.timeout(LIMIT_S):
        while len(await redis.entries(keys.decisions)) < count:
            await redis.read({keys.decisions: "$"}, count=1, block_s=0.05)


async def pending(redis, keys):
    return (await redis.command("XPENDING", keys.requests, DISPATCHER_GROUP))["pending"]


class TestDispatch:
    async def test_a_plain_xadd_is_served(self, redis_url, settings, redis, keys):
        """Model and body by hand at redis-cli are a request: handed over, finished, acknowledged."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            entry = await redis.command("XADD", keys.requests, "*", "model", "llama", "body", "{}")
            [held] = await worker.jobs()
            assert held.job.id == entry.decode()
            assert await worker.finish([held]) == [1]

            assert await results(redis, keys, 1) == {entry.decode(): "completed"}
            assert await pending(redis, keys) == 0

    async def test_many_are_served_once_each(self, redis_url, settings, redis, keys):
        """I1: what was enqueued before and after the start is all there in the end, once."""
        worker = PlayedWorker(redis, keys)
        for n in range(50):
            await enqueue(redis, keys, f"before-{n}")
        async with dispatching(redis_url, settings), worker.beating():
            for n in range(50):
                await enqueue(redis, keys, f"after-{n}")
            done = 0
            while done < 100:
                held = await worker.jobs()
                done += len(held)
                await worker.finish(held)

            assert len(await results(redis, keys, 100)) == 100
            assert await pending(redis, keys) == 0

    async def test_every_turn_is_logged(self, redis_url, settings, redis, keys):
        """The decisions of a request's life can be read in order; its reading, where it had to wait after it."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings):
            await enqueue(redis, keys, "early")
            await decided(redis, keys, 1)
            async with worker.beating():
                await worker.jobs()
                await enqueue(redis, keys, "late")
                await worker.jobs()
                await decided(redis, keys, 3)

                told = [(f[b"id"], f[b"kind"]) for _, f in await redis.entries(keys.decisions)]
                assert told == [
                    (b"early", b"read"),
                    (b"early", b"assigned"),
                    (b"late", b"assigned"),
                ]

    async def test_the_log_tells_things_in_the_order_in_which_they_were_decided(
        self, redis_url, settings, redis, keys, monkeypatch
    ):
        """Why one was handed over stands before whatever is logged of others in a later turn."""
        monkeypatch.setattr(loop, "REASONS_S", 60.0)
        worker = PlayedWorker(redis, keys)
        await worker.join()
        async with dispatching(redis_url, settings):
            for n in range(8):
                await enqueue(redis, keys, f"{n}")
                await worker.jobs()
                await redis.command(
                    "XADD", keys.requests, "*", "id", f"{n}-waits", "model", "other", "body", "{}"
                )
            await decided(redis, keys, 16)
            told = [f[b"id"].decode() for _, f in await redis.entries(keys.decisions)]
            assert all(told.index(f"{n}") < told.index(f"{n}-waits") for n in range(8))

    async def test_an_unreadable_entry_gets_its_one_record(self, redis_url, settings, redis, keys):
        """A bad value goes to `dead` with its fields, and its client is told; nothing stays pending."""
        fields = ["id", "odd", "model", "llama", "body", "{}", "ttft_ms", "soon", "note", "mine"]
        async with dispatching(redis_url, settings):
            await redis.command("XADD", keys.requests, "*", *fields)

            assert await results(redis, keys, 1) == {"odd": "invalid"}
            [(_, dead)] = await redis.entries(keys.dead)
            assert dead[b"note"] == b"mine"
            assert b"'ttft_ms' is 'soon'" in dead[b"dead_reason"]
            assert await pending(redis, keys) == 0

    async def test_an_unreadable_entry_under_a_living_id(self, redis_url, settings, redis, keys):
        """It is recorded under its entry's own id, and the living request goes on."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            await enqueue(redis, keys, "r1")
            [held] = await worker.jobs()
            odd = await redis.command(
                "XADD", keys.requests, "*", "id", "r1", "model", "llama", "stream", "perhaps"
            )
            assert await results(redis, keys, 1) == {odd.decode(): "invalid"}
            await worker.finish([held])

            assert await results(redis, keys, 2) == {odd.decode(): "invalid", "r1": "completed"}

    async def test_an_unreadable_beat_hurts_nobody(self, redis_url, settings, redis, keys):
        """It goes to `dead`, and the dispatcher turns on."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            await redis.command("XADD", keys.beats, "*", "endpoint", "e9", "epoch", "now")
            await enqueue(redis, keys, "r1")
            await worker.finish(await worker.jobs())

            assert await results(redis, keys, 1) == {"r1": "completed"}
            [(_, dead)] = await redis.entries(keys.dead)
            assert dead[b"dead_stream"] == keys.beats.encode()

    async def test_duplicates_are_served_once(self, redis_url, settings, redis, keys):
        """I2: plain XADDs that repeat an id, in one read or after its end, change nothing."""
        worker = PlayedWorker(redis, keys)
        again = ("XADD", keys.requests, "*", "id", "twice", "model", "llama", "body", "{}")
        await redis.ensure_group(keys.requests, DISPATCHER_GROUP)
        await redis.commands([again, again])
        async with dispatching(redis_url, settings), worker.beating():
            await redis.command(*again)
            await worker.finish(await worker.jobs())
            await redis.command(*again)
            await enqueue(redis, keys, "other")
            [held] = await worker.jobs()
            assert held.job.id == "other"
            await worker.finish([held])

            assert await results(redis, keys, 2) == {"twice": "completed", "other": "completed"}
            await until(lambda: nothing_pending(redis, keys))

    async def test_what_cannot_be_read_is_buried_once(self, redis_url, settings, redis, keys):
        """The next leader reads all controls again, and finds only one of them new."""

        async def is_buried(action):
            dead = await redis.entries(keys.dead)
            return dead[-1:] and dead[-1][1][b"action"] == action

        for name, action in (("d1", b"frob"), ("d2", b"twist")):
            async with dispatching(redis_url, settings, name) as node:
                await until(lambda node=node: node.is_leader)
                await redis.command("XADD", keys.controls, "*", "action", action)
                await until(lambda action=action: is_buried(action))

        assert await redis.command("XLEN", keys.dead) == 2

    async def test_the_dead_come_back(self, redis_url, settings, redis, keys):
        """A request that failed for good and is enqueued again under its id is served again, as it was promised."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            promised = {"ttft_s": 9.0, "tpot_s": 0.5, "deadline_s": 90.0, "blocks": ("a", "b")}
            await enqueue(redis, keys, "phoenix", max_attempts=1, **promised)
            [held] = await worker.jobs()
            result = Result(id="phoenix", outcome="failed", reason="engine said no")
            reward = worker.reward(held, "failed", redis.now())
            end = sidecar.finish(keys, held, result, pieces=0, ttl_s=60, is_dead=True)
            await redis.batch([end, sidecar.settle(keys, held, reward, is_dead=True)])
            [(dead_entry, fields)] = await redis.entries(keys.dead)
            own = {k.decode(): v for k, v in fields.items() if not k.startswith(b"dead_")}

            call = producer.requeue(keys, dead_entry, "phoenix", own)
            await redis.call(call.function, call.keys, call.args)

            [again] = await worker.jobs()
            assert (again.job.ttft_s, again.job.tpot_s) == (9.0, 0.5)
            assert again.job.deadline_at == pytest.approx(again.job.enqueued_at + 90.0)
            assert own["blocks"] == b"a b"
            await worker.finish([again])
            outcomes = await redis.entries(keys.results)
            assert [f[b"outcome"] for _, f in outcomes] == [b"failed", b"completed"]


class TestUnsettled:
    async def test_a_worker_that_ends_a_request_and_dies(self, redis_url, settings, redis, keys):
        """Its seat and its entries come free with the lease; the request is not served again, and the next one is."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings):
            async with worker.beating():
                await enqueue(redis, keys, "r1")
                [held] = await worker.jobs()
                call = worker.finishing(held)
                assert await redis.call(call.function, call.keys, call.args) == 1
            successor = PlayedWorker(redis, keys)
            async with successor.beating():
                await until(lambda: nothing_pending(redis, keys))
                await enqueue(redis, keys, "r2")
                [other] = await successor.jobs()
                assert other.job.id == "r2"
                await successor.finish([other])

                assert await results(redis, keys, 2) == {"r1": "completed", "r2": "completed"}
            assert await redis.entries(keys.jobs(worker.endpoint)) == []


class TestControls:
    async def test_a_waiting_request_is_cancelled(self, redis_url, settings, redis, keys):
        """Nobody serves it; the dispatcher itself ends it."""
        async with dispatching(redis_url, settings):
            await enqueue(redis, keys, "r1")
            await cancel(redis, keys, "r1")

            assert await results(redis, keys, 1) == {"r1": "cancelled"}
            assert await pending(redis, keys) == 0

    async def test_a_request_cancelled_before_it_is_read(self, redis_url, settings, redis, keys):
        """The tombstone is found at the reading, even when its control entry was not; nobody is said to have it."""
        worker = PlayedWorker(redis, keys)
        await enqueue(redis, keys, "r1")
        await cancel(redis, keys, "r1")
        await redis.command("DEL", keys.controls)
        async with worker.beating(), dispatching(redis_url, settings):
            assert await results(redis, keys, 1) == {"r1": "cancelled"}
            await enqueue(redis, keys, "r2")
            await worker.jobs()
            await decided(redis, keys, 2)

            told = [(f[b"id"], f[b"kind"]) for _, f in await redis.entries(keys.decisions)]
            assert told == [(b"r1", b"finished"), (b"r2", b"assigned")]

    async def test_a_cancel_by_hand_outlives_the_leader_that_did_not_obey_it(
        self, redis_url, settings, redis, keys
    ):
        """No tombstone repeats it, and the next leader reads on behind it; what was asked before a request came is over."""
        worker = PlayedWorker(redis, keys)

        async def asked(name):
            words = ("XADD", keys.requests, "*", "id", name, "model", "llama", "body", "{}")
            await redis.command(*words)

        async def cancelled_by_hand(*names):
            for name in names:
                await redis.command("XADD", keys.controls, "*", "action", "cancel", "id", name)

        async with worker.beating():
            async with dispatching(redis_url, settings, "d1"):
                await asked("held")
                [held] = await worker.jobs()
            await cancelled_by_hand("again")
            await asked("read")
            await redis.read_group(DISPATCHER_GROUP, "d1", [keys.requests], count=9, block_s=None)
            await asked("unread")
            await asked("again")
            await cancelled_by_hand("held", "read", "unread")

            async with dispatching(redis_url, settings, "d2"):
                [again] = await worker.jobs()
                assert again.job.id == "again"
                while not worker.aborted:
                    await worker.pull()
                assert worker.aborted == ["held"]
                await worker.finish([held], "cancelled")
                await worker.finish([again])
                ended = await results(redis, keys, 4)
        assert ended.pop("again") == "completed"
        assert ended == dict.fromkeys(("held", "read", "unread"), "cancelled")

    async def test_a_held_request_is_cancelled_by_its_worker(
        self, redis_url, settings, redis, keys
    ):
        """The worker is told on its own stream, and its record is the one that counts."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            await enqueue(redis, keys, "r1")
            [held] = await worker.jobs()
            await cancel(redis, keys, "r1")
            async with asyncio.timeout(LIMIT_S):
                while not worker.aborted:
                    await worker.pull()
            await worker.finish([held], "cancelled")

            assert await results(redis, keys, 1) == {"r1": "cancelled"}


class TestRetries:
    async def test_what_is_handed_back_is_tried_again(self, redis_url, settings, redis, keys):
        """A second attempt carries the original arrival."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings), worker.beating():
            await enqueue(redis, keys, "r1")
            [first] = await worker.jobs()
            await worker.hand_back(first)
            [second] = await worker.jobs()
            assert (first.job.attempt, second.job.attempt) == (1, 2)
            assert second.job.enqueued_at == first.job.enqueued_at
            assert await worker.finish([first, second]) == [0, 1]

            assert await results(redis, keys, 1) == {"r1": "completed"}

    async def test_a_silent_endpoint_loses_its_jobs(self, redis_url, settings, redis, keys):
        """Its lease runs out, another endpoint serves them, and its late result is refused."""
        silent = PlayedWorker(redis, keys, "silent")
        async with dispatching(redis_url, settings):
            async with silent.beating():
                for n in range(5):
                    await enqueue(redis, keys, f"r{n}")
                lost = await silent.jobs(5)
            other = PlayedWorker(redis, keys, "other")
            async with other.beating():
                taken = await other.jobs(5)
                assert await silent.finish(lost) == [0] * 5
                assert await other.finish(taken) == [1] * 5

            assert len(await results(redis, keys, 5)) == 5
            assert await redis.entries(keys.jobs("silent")) == []


class TestTakeover:
    async def test_nothing_is_lost_between_two_leaders(self, redis_url, settings, redis, keys):
        """What waits is served by the next leader; what a living worker holds stays with it."""
        worker = PlayedWorker(redis, keys)
        async with worker.beating():
            async with dispatching(redis_url, settings, "d1"):
                await enqueue(redis, keys, "held")
                [held] = await worker.jobs()
            await enqueue(redis, keys, "between")
            async with dispatching(redis_url, settings, "d2") as second:
                [between] = await worker.jobs()
                assert second.view().assigned == 2
                assert await worker.finish([held, between]) == [1, 1]

                assert len(await results(redis, keys, 2)) == 2
                assert await pending(redis, keys) == 0
                await until(lambda: second.view().assigned == 0)

    async def test_why_the_last_were_handed_over_is_logged_at_the_end(
        self, redis_url, settings, redis, keys, monkeypatch
    ):
        """Reasons wait for a turn in which nobody arrives; a reign that ends in order has no such turn any more."""
        monkeypatch.setattr(loop, "REASONS_S", 60.0)
        worker = PlayedWorker(redis, keys)
        await worker.join()
        async with dispatching(redis_url, settings) as node:
            await enqueue(redis, keys, "last")
            await worker.jobs()
            while not node._meter.assigned:  # noqa: ASYNC110  not longer than that: some later turn would log it
                await asyncio.sleep(0)
        told = [(f[b"id"], f[b"kind"]) for _, f in await redis.entries(keys.decisions)]
        assert told[-1] == (b"last", b"assigned")

    async def test_what_a_frozen_leader_swallowed_is_found(self, redis_url, settings, redis, keys):
        """Entries that an old leader's blocked read takes after its end are served all the same."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings, "d2") as node, worker.beating():
            await until(lambda: node.is_leader)
            await swallow(redis, keys, "old")
            await worker.finish(await worker.jobs())

            assert len(await results(redis, keys, 1)) == 1

    async def test_what_a_lost_reply_held_is_found(self, redis_url, settings, redis, keys):
        """Entries given to this very node in a reply that never came are read again after the break."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings, "d1") as node, worker.beating():
            await until(lambda: node.is_leader)
            await swallow(redis, keys, "d1")
            await redis.command("CLIENT", "KILL", "TYPE", "normal")
            [held] = await worker.jobs()
            assert await worker.finish([held]) == [1]

    async def test_the_learned_is_taken_over(self, redis_url, settings, redis, keys):
        """A snapshot is saved while leading and at leaving; garbage in its place is a cold start."""
        async with dispatching(redis_url, settings, "d1") as node:
            await until(lambda: node.is_leader)
            await until(lambda: redis.command("GET", keys.snapshot))
        assert (await redis.command("HGET", keys.leader, "until")) == b"0"
        for garbage in (b'{"format": 1, "nonsense": []}', b'{"rewards": "\xff"}', b"[" * 100_000):
            await redis.command("SET", keys.snapshot, garbage)
            assert (await glance.pool(redis, keys)).drained == []
            async with dispatching(redis_url, settings, "d2") as node:
                await until(lambda node=node: node.is_leader)

    async def test_a_server_that_forgot_everything(self, redis_url, settings, redis, keys):
        """Redis comes back empty: lease, group and functions are made anew, and work goes on."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings) as node:
            await until(lambda: node.is_leader)
            await redis.commands([("FLUSHALL",), ("FUNCTION", "FLUSH")])
            async with worker.beating():
                await enqueue(redis, keys, "anew")
                await worker.finish(await worker.jobs())

                assert await results(redis, keys, 1) == {"anew": "completed"}

    @pytest.mark.parametrize("is_held", [False, True], ids=["waiting", "held"])
    async def test_what_was_lost_and_sent_again(self, redis_url, settings, redis, keys, is_held):
        """Redis lost an entry that the core still knows; under a new one the same id is served, once."""
        worker = PlayedWorker(redis, keys)
        async with dispatching(redis_url, settings) as node:
            await until(lambda: node.is_leader)
            async with worker.beating() if is_held else contextlib.nullcontext():
                lost = await enqueue(redis, keys, "r1")
                held = await worker.jobs() if is_held else []
                await decided(redis, keys, 1)
                await redis.commands(
                    [
                        ("XACK", keys.requests, DISPATCHER_GROUP, lost),
                        ("XDEL", keys.requests, lost),
                        ("DEL", keys.request("r1"), keys.waiting),
                        *(
                            ("XACK", keys.jobs(worker.endpoint), "worker", one.job_entry)
                            for one in held
                        ),
                    ]
                )

                await enqueue(redis, keys, "r1")
                async with worker.beating():
                    await worker.finish(await worker.jobs())

                    assert await results(redis, keys, 1) == {"r1": "completed"}
                    assert await pending(redis, keys) == 0


class TestEnd:
    async def test_a_cancel_in_the_moment_of_a_failure_is_obeyed(
        self, redis_url, settings, monkeypatch
    ):
        """A reign that just fails takes no cancel with it: the node ends, and does not stand for leader again."""
        failing, has_failed = asyncio.Event(), asyncio.Event()

        async def fail(_):
            await failing.wait()
            has_failed.set()
            raise StreamError("Redis went away in this very moment")

        monkeypatch.setattr(Upkeep, "run", fail)
        connection = await Connection.connect(Where(url=redis_url))
        node = Node(connection, settings, name="d1")
        task = asyncio.create_task(node.run())
        await until(lambda: node.is_leader)

        failing.set()
        await has_failed.wait()
        task.cancel()

        async with asyncio.timeout(LIMIT_S):
            done, _ = await asyncio.wait([task])
        assert task in done
        assert task.cancelled()
        await connection.close()


async def test_a_redis_that_went_back_is_read_anew(tmp_path, pool, keys, settings):
    """It has lost an end, and says that its request waits: it is taken up again, and not left there until the next leader."""
    with Server(directory=tmp_path) as server:
        redis = await Connection.connect(Where(url=server.url))
        async with dispatching(server.url, settings) as node:
            await enqueue(redis, keys, "r1")
            await until(lambda: node.is_leader and node.view().waiting)
            await redis.command("CONFIG", "SET", "appendonly", "no")
            call = producer.cancel(keys, "r1")
            await redis.call(call.function, call.keys, call.args)
            await until(lambda: node.is_leader and not node.view().waiting)

            await asyncio.to_thread(server.stop)
            server.start()

            await until(lambda: node.is_leader and node.view().waiting)
        await redis.close()


class TestUpkeep:
    async def test_a_cut_is_as_long_as_the_fastest_stream_needs(self, redis, keys):
        """At Redis' own limit of 10,000 entries a cut, more than 1,000 results a second would pile up."""
        many = (
            "for i = 1, 30000 do redis.call('XADD', KEYS[1], i .. '-0', 'a', 'b') end",
            *("1", keys.results),
        )
        await redis.command("EVAL", *many)

        await Upkeep(redis, keys, 1, node="d1", retention_s=60, body_ttl_s=60).trim_logs()

        assert await redis.command("XLEN", keys.results) == 0

    async def test_who_waits_keeps_its_body(self, redis, keys):
        """However long: the claim check of one that waits is given a new life before its own runs out."""
        long = Request(id="r1", model="llama", body=b"x" * 5000)
        call = producer.submit(keys, long, now=redis.now(), waiting_max=0, body_ttl_s=5)
        await redis.call(call.function, call.keys, call.args)
        await redis.command("SET", keys.body("r2"), "of one that has ended", "PX", 5000)
        upkeep = Upkeep(redis, keys, 1, node="d1", retention_s=60, body_ttl_s=3600)

        await upkeep.keep_bodies()

        assert await redis.command("PTTL", keys.body("r1")) > 3_000_000
        assert await redis.command("PTTL", keys.body("r2")) <= 5000

    async def test_a_redis_that_would_evict_is_named(self, tmp_path, keys):
        """Once, with what it should be: what it throws away nobody misses until it is asked for."""
        with Server(directory=tmp_path) as server:
            redis = await Connection.connect(Where(url=server.url))
            upkeep = Upkeep(redis, keys, 1, node="d1", retention_s=60, body_ttl_s=60)
            said = []
            for words in (("maxmemory-policy", "volatile-lru"), ("maxmemory", "1gb"), ()):
                if words:
                    await redis.command("CONFIG", "SET", *words)
                with capture_logs() as logs:
                    await upkeep.weigh()
                said.append([(one["event"], one["maxmemory_policy"]) for one in logs])
            await redis.close()

        assert said == [[], [("redis_evicts", "volatile-lru")], []]

    async def test_who_comes_to_a_full_redis_leads_and_empties_it(self, tmp_path, pool, keys):
        """Only a leader cuts the logs: if it could not lead, no shorter retention would ever be heeded."""
        settings = Settings(
            pool=pool,
            lease=LeaseSettings(leader_s=0.6, worker_s=1.0, beat_s=0.2),
            loop=LoopSettings(retention_s=1.0),
        )
        with Server(directory=tmp_path) as server:
            redis = await Connection.connect(Where(url=server.url))
            await redis.command("FLUSHALL")
            words = "for i = 1, 200 do redis.call('XADD', KEYS[1], i .. '-0', 'a', ARGV[1]) end"
            await redis.command("EVAL", words, "1", keys.results, "x" * 50_000)
            await enqueue(redis, keys, "r1")
            used = (await redis.memory())["used_memory"]
            await redis.command("CONFIG", "SET", "maxmemory", str(used - 5_000_000))
            with pytest.raises(StreamError, match="OOM"):
                await enqueue(redis, keys, "r2")

            async with dispatching(server.url, settings) as node:
                await until(lambda: node.is_leader)

                assert await redis.command("XLEN", keys.results) < 200
                await enqueue(redis, keys, "r2")
            await redis.close()

    async def test_the_unfinished_is_never_cut(self, redis, keys):
        """Trimming stops at the oldest pending entry and at the first unread one, whatever the retention."""
        await redis.ensure_group(keys.requests, DISPATCHER_GROUP)
        entry = ("XADD", keys.requests, "*", "model", "llama")
        ids = [i.decode() for i in await redis.commands([entry] * 300)]
        await redis.read_group(DISPATCHER_GROUP, "d1", [keys.requests], count=200, block_s=None)
        await redis.command("XACK", keys.requests, DISPATCHER_GROUP, *ids[:150])
        upkeep = Upkeep(redis, keys, 1, node="d1", retention_s=-60, body_ttl_s=60)

        await upkeep.trim()

        left = [entry_id for entry_id, _ in await redis.entries(keys.requests)]
        assert 150 <= len(left) < 300
        assert left[-150:] == ids[150:]


class TestPages:
    async def test_probes_and_figures(self, redis_url, settings, redis, keys):
        """A leader is healthy and ready, and its figures name the pool."""
        async with dispatching(redis_url, settings) as node, node.pages.served(0) as port:
            await until(lambda: node.is_leader)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as visitor:
                for page in ("/healthz", "/readyz"):
                    async with visitor.get(page) as answer:
                        assert (answer.status, await answer.text()) == (200, "ok\n")
                async with visitor.get("/metrics") as answer:
                    text = await answer.text()
        assert f'headgate_is_leader{{pool="{keys.pool}"}} 1.0' in text
        assert f'headgate_backlog_seconds{{pool="{keys.pool}"}} 0.0' in text

    async def test_a_taken_port_is_a_settings_error(self, redis, settings):
        """It names the port and what is wanted."""
        node = Node(redis, settings, name="d1")
        async with node.pages.served(0) as port:
            with pytest.raises(SettingsError, match=f"metrics port is {port}, wanted a free one"):
                async with node.pages.served(port):
                    pass


async def cancel(redis, keys, request_id):
    call = producer.cancel(keys, request_id)
    assert await redis.call(call.function, call.keys, call.args) == 1


async def swallow(redis, keys, consumer):
    """Enqueue and give it to this consumer at once, so that the living leader's blocked read comes too late."""
    script = """
        redis.call('XADD', KEYS[1], '*', 'model', 'llama', 'body', '{}')
        redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'STREAMS', KEYS[1], '>')
    """
    await redis.command("EVAL", script, 1, keys.requests, DISPATCHER_GROUP, consumer)


async def nothing_pending(redis, keys):
    return await pending(redis, keys) == 0
