"""The fenced moves on a real server: who may write what, and that saying a thing twice does it once."""

from collections.abc import AsyncIterator

import msgspec
import pytest

from dispatcher.streams import dispatch, producer, sidecar
from dispatcher.streams.connection import Connection, Where
from dispatcher.streams.sidecar import Held
from scheduler.errors import StreamError
from scheduler.events import Abort, Arrived, Assign, Finish, Reclaim
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.client import Request
from scheduler.wire.dispatcher import Decision, Job
from scheduler.wire.worker import Beat, Result, Reward, Tokens

KEYS = Keys("hg", "moves")
ENDPOINT = "a100-0"


@pytest.fixture
async def redis(every_server: str) -> AsyncIterator[Connection]:
    connection = await Connection.connect(Where(url=every_server))
    await connection.ensure_group(KEYS.requests, DISPATCHER_GROUP)
    await connection.ensure_group(KEYS.jobs(ENDPOINT), WORKER_GROUP)
    yield connection
    await connection.close()


async def do(redis, call):
    return await redis.call(call.function, call.keys, call.args)


async def led(redis, node="d1", ttl_s=3.0):
    return int((await do(redis, dispatch.lead(KEYS, node, ttl_s=ttl_s)))[0])


async def enqueued(redis, request_id="r1", **fields):
    request = Request(id=request_id, model="llama", body=b"{}", **fields)
    await do(redis, producer.submit(KEYS, request, now=redis.now(), waiting_max=0, body_ttl_s=60))
    read = await redis.read_group(DISPATCHER_GROUP, "d1", [KEYS.requests], count=10, block_s=None)
    entry = read[KEYS.requests][-1][0]
    return Arrived(request=request, entry=entry, enqueued_at=0.0)


def assignment(arrived, attempt=1, endpoint=ENDPOINT):
    job = Job(
        id=arrived.request.id,
        entry=arrived.entry,
        attempt=attempt,
        epoch=1,
        model="llama",
        path="/v1/completions",
        enqueued_at=0.0,
        decided_at=0.0,
        stream=True,
    )
    decision = Decision(id=job.id, kind="assigned", endpoint=endpoint)
    return Assign(endpoint=endpoint, job=job, explain=lambda: decision)


async def assigned(redis, epoch, request_id="r1", attempt=1):
    arrived = await enqueued(redis, request_id)
    await do(redis, dispatch.accept(KEYS, epoch, arrived, None))
    command = assignment(arrived, attempt)
    entry = await do(redis, dispatch.assign(KEYS, epoch, command))
    return arrived, Held(ENDPOINT, command.job, entry.decode())


def finished(held, outcome="completed", **options):
    result = Result(id=held.job.id, outcome=outcome)
    return sidecar.finish(KEYS, held, result, pieces=0, ttl_s=60, **options)


def settled(held, outcome="completed", **options):
    reward = Reward(
        id=held.job.id, endpoint=held.endpoint, epoch=1, attempt=held.job.attempt, outcome=outcome
    )
    return sidecar.settle(KEYS, held, reward, **options)


def reclaiming(arrived, attempt=1):
    return Reclaim(
        id=arrived.request.id,
        entry=arrived.entry,
        endpoint=ENDPOINT,
        attempt=attempt,
        deadline_at=None,
        decision=Decision(id=arrived.request.id, kind="reclaimed"),
    )


async def pending(redis):
    """Entries that somebody still has to see to, of `requests` and of the endpoint's jobs."""
    return [
        (await redis.command("XPENDING", *one))["pending"]
        for one in ((KEYS.requests, DISPATCHER_GROUP), (KEYS.jobs(ENDPOINT), WORKER_GROUP))
    ]


async def pulled(redis):
    """The worker has read what was handed to it."""
    await redis.read_group(WORKER_GROUP, "w1", [KEYS.jobs(ENDPOINT)], count=10, block_s=None)


class TestLeadership:
    async def test_a_second_node_waits_for_the_lease(self, redis):
        """While a lease lives nobody else gets an epoch; resigning ends it at once."""
        first = await led(redis, "d1")
        assert first > 0
        assert await led(redis, "d2") == 0

        await do(redis, dispatch.resign(KEYS, first))

        assert await led(redis, "d2") > first

    async def test_renewal_keeps_the_epoch(self, redis):
        """The holder renews under the same epoch, even after its lease ran out unnoticed."""
        epoch = await led(redis, ttl_s=0.0)

        reply = await do(redis, dispatch.lead(KEYS, "d1", ttl_s=3, epoch=epoch))

        assert reply[0] == epoch

    async def test_a_lease_from_before_the_clock_went_back_is_over(self, redis):
        """A new master whose clock is hours behind is led within one lease, under a later epoch all the same."""
        first = await led(redis, "d1")
        hour_ms = 3_600_000
        until = int(await redis.command("HGET", KEYS.leader, "until")) + hour_ms
        await redis.command("HSET", KEYS.leader, "until", until, "epoch", first + hour_ms)

        assert await led(redis, "d2") > first + hour_ms

    async def test_a_deposed_leader_moves_nothing(self, redis):
        """Every leader's move under an old epoch is refused and writes nothing."""
        old = await led(redis, "d1", ttl_s=0.0)
        arrived = await enqueued(redis)
        new = await led(redis, "d2")
        assert new > old
        finish = Finish(entry=arrived.entry, reply_to="", result=Result(id="r1", outcome="expired"))
        reclaim = reclaiming(arrived)

        replies = await redis.batch(
            [
                dispatch.accept(KEYS, old, arrived, None),
                dispatch.assign(KEYS, old, assignment(arrived)),
                dispatch.reclaim(KEYS, old, reclaim),
                dispatch.conclude(KEYS, old, finish, ttl_s=60),
                dispatch.save(KEYS, old, b"x"),
                dispatch.notes(KEYS, old, [Decision(id="r1", kind="read")]),
                dispatch.abort(KEYS, old, Abort(id="r1", endpoint=ENDPOINT, attempt=1)),
                dispatch.bury(KEYS, old, {"strange": "beat"}),
            ]
        )

        assert replies == [dispatch.FENCED] * 8
        for stream in (KEYS.jobs(ENDPOINT), KEYS.results, KEYS.decisions, KEYS.dead):
            assert await redis.entries(stream) == []


class TestEnqueue:
    async def test_the_same_id_is_enqueued_once(self, redis):
        """A repeated submit (a lost reply, a restarted client) finds the first entry."""
        request = Request(id="twice", model="llama", body=b"{}")
        call = producer.submit(KEYS, request, now=0.0, waiting_max=0, body_ttl_s=60)

        first, second = await do(redis, call), await do(redis, call)

        assert (first[0], second[0]) == (1, 0)
        assert first[1] == second[1]
        assert len(await redis.entries(KEYS.requests)) == 1

    async def test_a_full_queue_refuses_exactly(self, redis):
        """The limit is checked in the same move, so it is never overshot."""
        for n in range(3):
            request = Request(id=f"r{n}", model="llama", body=b"{}")
            reply = await do(
                redis, producer.submit(KEYS, request, now=0.0, waiting_max=2, body_ttl_s=60)
            )
        assert list(reply) == [-1, 2]
        assert len(await redis.entries(KEYS.requests)) == 2

    async def test_a_long_body_is_a_claim_check(self, redis):
        """Above 1 KB the entry stays small and the body lies in its own key."""
        request = Request(id="long", model="llama", body=b"x" * 5000)

        await do(redis, producer.submit(KEYS, request, now=0.0, waiting_max=0, body_ttl_s=60))

        [(_, fields)] = await redis.entries(KEYS.requests)
        assert fields[b"body"] == b""
        assert await redis.command("GET", KEYS.body("long")) == b"x" * 5000

    async def test_a_plain_duplicate_is_acknowledged_and_dropped(self, redis):
        """An XADD that repeats a living id is refused at the reading and leaves nothing pending."""
        epoch = await led(redis)
        first = await enqueued(redis)
        await do(redis, dispatch.accept(KEYS, epoch, first, None))
        again = await redis.command(
            "XADD", KEYS.requests, "*", "id", "r1", "model", "llama", "body", "{}"
        )
        await redis.read_group(DISPATCHER_GROUP, "d1", [KEYS.requests], count=10, block_s=None)
        second = Arrived(request=first.request, entry=again.decode(), enqueued_at=0.0)

        assert await do(redis, dispatch.accept(KEYS, epoch, second, None)) == 0

        pending = await redis.command("XPENDING", KEYS.requests, DISPATCHER_GROUP)
        assert pending["pending"] == 1


class TestHandedOverAtOnce:
    async def test_its_reading_needs_no_move_of_its_own(self, redis):
        """Assigned in the step that reads it: written down as if it had been accepted before."""
        epoch = await led(redis)
        entry = (
            await redis.command("XADD", KEYS.requests, "*", "model", "m", "body", "{}")
        ).decode()
        arrived = Arrived(request=Request(id=entry, model="m"), entry=entry, enqueued_at=0.0)
        command = assignment(arrived)

        job = await do(redis, dispatch.assign(KEYS, epoch, command, is_new=True))
        again = await do(redis, dispatch.assign(KEYS, epoch, command, is_new=True))

        assert job == again
        assert len(await redis.entries(KEYS.jobs(ENDPOINT))) == 1
        [standing] = await redis.hashes([KEYS.request(entry)], ["state", "entry", "attempt"])
        assert standing == [b"assigned", entry.encode(), b"1"]

    async def test_another_entry_of_a_living_id_is_refused(self, redis):
        """Not even the same endpoint and attempt make a duplicate the request itself."""
        epoch = await led(redis)
        first, _ = await assigned(redis, epoch)
        second = Arrived(request=first.request, entry="9999999999999-0", enqueued_at=0.0)

        assert await do(redis, dispatch.assign(KEYS, epoch, assignment(second), is_new=True)) == 0
        assert len(await redis.entries(KEYS.jobs(ENDPOINT))) == 1

    async def test_the_cancelled_and_the_unknown_are_refused(self, redis):
        """A tombstone stands before the reading; and what Redis has forgotten is read anew before it is tried."""
        epoch = await led(redis)
        arrived = await enqueued(redis)
        await do(redis, producer.cancel(KEYS, "r1"))

        assert await do(redis, dispatch.assign(KEYS, epoch, assignment(arrived), is_new=True)) == 0
        await redis.command("DEL", KEYS.request("r1"))
        assert await do(redis, dispatch.assign(KEYS, epoch, assignment(arrived))) == 0


class TestOneTerminal:
    async def test_the_entries_are_pending_until_the_end_is_settled(self, redis):
        """I9: what is not terminal, or has no reward yet, can always be found again in a pending list."""
        epoch = await led(redis)
        _, held = await assigned(redis, epoch)
        await pulled(redis)
        assert await do(redis, finished(held)) == 1
        assert await pending(redis) == [1, 1]
        assert await redis.entries(KEYS.rewards) == []

        assert await do(redis, settled(held)) == 1

        assert await pending(redis) == [0, 0]
        assert await redis.entries(KEYS.jobs(ENDPOINT)) == []
        assert len(await redis.entries(KEYS.rewards)) == 1

    async def test_what_has_not_ended_is_not_settled(self, redis):
        """Where Redis had no room for the record the reward waits for it: both are said again, in their order."""
        epoch = await led(redis)
        _, held = await assigned(redis, epoch)
        await pulled(redis)

        with pytest.raises(StreamError, match="has not ended"):
            await do(redis, settled(held))

        assert await pending(redis) == [1, 1]

    async def test_whoever_takes_up_an_end_that_nobody_settled_finds_it_ended(self, redis):
        """A worker dies between its two moves: the record stands alone, and nothing is left pending or served again."""
        epoch = await led(redis)
        arrived, held = await assigned(redis, epoch)
        await pulled(redis)
        await do(redis, finished(held))

        assert await do(redis, dispatch.reclaim(KEYS, epoch, reclaiming(arrived))) == 0
        assert await do(redis, dispatch.accept(KEYS, epoch, arrived, None)) == 0

        assert await pending(redis) == [0, 0]
        assert await redis.entries(KEYS.jobs(ENDPOINT)) == []
        assert len(await redis.entries(KEYS.results)) == 1
        assert await do(redis, settled(held)) == 0, "it was only frozen, and comes too late"
        assert await redis.entries(KEYS.rewards) == []

    async def test_every_trace_of_an_end_has_a_bound_before_it_is_settled(self, redis):
        """What `finish` leaves runs out by itself, should nobody settle it: the request's hash, its log, its own stream."""
        epoch = await led(redis)
        arrived = await enqueued(redis, reply_to=f"{KEYS.results}:me")
        command = assignment(arrived)
        job = msgspec.structs.replace(command.job, reply_to=f"{KEYS.results}:me")
        entry = await do(redis, dispatch.assign(KEYS, epoch, command, is_new=True))
        held = Held(ENDPOINT, job, entry.decode())
        await do(
            redis,
            sidecar.tokens(KEYS, held, Tokens(attempt=1, index=0, pieces=1, text="a"), ttl_s=60),
        )

        assert await do(redis, finished(held)) == 1

        left = (KEYS.request("r1"), KEYS.tokens("r1"), f"{KEYS.results}:me")
        for ttl_ms in await redis.commands([("PTTL", key) for key in left]):
            assert 0 < ttl_ms <= 60_000

    async def test_a_refused_end_settles_its_stale_job_and_nothing_else(self, redis):
        """The request is another's by now: its entry stays pending, its body stays, and no reward is given."""
        epoch = await led(redis)
        _, zombie = await assigned(redis, epoch)
        await pulled(redis)
        await redis.command("SET", KEYS.body("r1"), "{}")
        await redis.command("HSET", KEYS.request("r1"), "attempt", 2)
        assert await do(redis, finished(zombie)) == 0

        assert await do(redis, settled(zombie)) == 1

        assert await pending(redis) == [1, 0]
        assert await redis.command("EXISTS", KEYS.body("r1")) == 1
        assert await redis.entries(KEYS.rewards) == []

    async def test_a_zombie_cannot_end_what_was_reclaimed(self, redis):
        """I2: the frozen worker's result is refused, the second attempt's stands alone."""
        epoch = await led(redis)
        arrived, zombie = await assigned(redis, epoch)
        assert await do(redis, dispatch.reclaim(KEYS, epoch, reclaiming(arrived))) == 1
        second = assignment(arrived, attempt=2)
        entry = await do(redis, dispatch.assign(KEYS, epoch, second))

        assert await do(redis, finished(zombie)) == 0
        assert await do(redis, sidecar.start(KEYS, zombie)) == 0
        tokens = Tokens(attempt=1, index=0, pieces=1, text="late")
        assert await do(redis, sidecar.tokens(KEYS, zombie, tokens, ttl_s=60)) == 0
        assert await do(redis, finished(Held(ENDPOINT, second.job, entry.decode()))) == 1

        assert len(await redis.entries(KEYS.results)) == 1
        assert [f[b"end"] for _, f in await redis.entries(KEYS.tokens("r1"))] == [b"completed"]

    async def test_saying_it_again_changes_nothing(self, redis):
        """A move repeated after a lost reply answers as the first did and writes once."""
        epoch = await led(redis)
        arrived, held = await assigned(redis, epoch)
        await pulled(redis)
        again = await do(redis, dispatch.assign(KEYS, epoch, assignment(arrived)))
        assert again.decode() == held.job_entry
        piece = sidecar.tokens(KEYS, held, Tokens(attempt=1, index=0, pieces=1, text="a"), ttl_s=60)
        assert [await do(redis, piece), await do(redis, piece)] == [1, 1]
        assert len(await redis.entries(KEYS.tokens("r1"))) == 1

        assert [await do(redis, finished(held)), await do(redis, finished(held))] == [1, 1]
        assert [await do(redis, settled(held)), await do(redis, settled(held))] == [1, 0]

        assert len(await redis.entries(KEYS.results)) == 1
        assert len(await redis.entries(KEYS.rewards)) == 1

    async def test_the_dispatcher_does_not_end_what_a_worker_holds(self, redis):
        """Between hand-over and reclaim only the worker may write the terminal record."""
        epoch = await led(redis)
        arrived, held = await assigned(redis, epoch)
        finish = Finish(
            entry=arrived.entry, reply_to="", result=Result(id="r1", outcome="cancelled")
        )

        assert await do(redis, dispatch.conclude(KEYS, epoch, finish, ttl_s=60)) == 0
        assert await do(redis, finished(held)) == 1

    async def test_a_cancelled_request_is_not_assigned(self, redis):
        """The tombstone is seen by the reading, the hand-over and the admission."""
        epoch = await led(redis)
        arrived = await enqueued(redis)
        assert await do(redis, producer.cancel(KEYS, "r1")) == 1

        assert await do(redis, dispatch.accept(KEYS, epoch, arrived, None)) == 2
        assert await do(redis, dispatch.assign(KEYS, epoch, assignment(arrived))) == 0
        assert len(await redis.entries(KEYS.controls)) == 1

    async def test_the_dead_come_back(self, redis):
        """A failed request keeps its fields and body in `dead` and can be enqueued anew."""
        epoch = await led(redis)
        _, held = await assigned(redis, epoch)
        await do(redis, finished(held, outcome="failed", is_dead=True))
        [(dead_entry, fields)] = await redis.entries(KEYS.dead)
        own = {k.decode(): v for k, v in fields.items() if not k.startswith(b"dead_")}

        reply = await do(redis, producer.requeue(KEYS, dead_entry, "r1", own))

        assert reply not in (0, -1)
        assert await redis.entries(KEYS.dead) == []
        assert len(await redis.entries(KEYS.requests)) == 2

    async def test_the_dead_come_back_without_their_log(self, redis):
        """What a stream had said before it failed is over: its next life would be read behind it, and continued."""
        epoch = await led(redis)
        _, held = await assigned(redis, epoch)
        said = Tokens(attempt=1, index=0, pieces=1, text="half an ans")
        await do(redis, sidecar.tokens(KEYS, held, said, ttl_s=60))
        await do(redis, finished(held, outcome="failed", is_dead=True))
        assert len(await redis.entries(KEYS.tokens("r1"))) == 2
        [(dead_entry, _)] = await redis.entries(KEYS.dead)

        assert await do(redis, producer.requeue(KEYS, "0-1", "r1", {"id": "r1"})) == 0
        assert len(await redis.entries(KEYS.tokens("r1"))) == 2, "another's end is none of its"
        await do(redis, producer.requeue(KEYS, dead_entry, "r1", {"id": "r1"}))

        assert await redis.entries(KEYS.tokens("r1")) == []


class TestWorker:
    async def test_a_newer_worker_fences_the_older(self, redis):
        """Two workers in one endpoint's name: the later epoch beats, the earlier is refused."""
        old = await do(redis, sidecar.join(KEYS, ENDPOINT, "w1"))
        new = await do(redis, sidecar.join(KEYS, ENDPOINT, "w2"))
        assert new > old

        assert (
            await do(redis, sidecar.beat(KEYS, Beat(endpoint=ENDPOINT, epoch=old), lease_s=3)) == 0
        )
        assert (
            await do(redis, sidecar.beat(KEYS, Beat(endpoint=ENDPOINT, epoch=new), lease_s=3)) == 1
        )
        assert len(await redis.entries(KEYS.beats)) == 1

    async def test_an_endpoint_gone_for_good_leaves_nothing(self, redis):
        """Beats keep its glance and its stream of jobs alive, equally long; without them both end."""
        worker_epoch = int(await do(redis, sidecar.join(KEYS, ENDPOINT, "w1")))
        assert await redis.command("PTTL", KEYS.jobs(ENDPOINT)) == -1

        beat = Beat(endpoint=ENDPOINT, epoch=worker_epoch)
        assert await do(redis, sidecar.beat(KEYS, beat, lease_s=3)) == 1

        of_jobs, of_glance = await redis.commands(
            [("PTTL", KEYS.jobs(ENDPOINT)), ("PTTL", KEYS.endpoint(ENDPOINT))]
        )
        assert 0 < of_glance <= of_jobs <= 600 * 3 * 1000

    async def test_handing_back_returns_it_to_waiting(self, redis):
        """A job handed back may be assigned again, under a new attempt only."""
        epoch = await led(redis)
        arrived, held = await assigned(redis, epoch)
        reward = Reward(id="r1", endpoint=ENDPOINT, epoch=1, attempt=1, outcome="returned")

        assert await do(redis, sidecar.hand_back(KEYS, held, reward)) == 1

        assert await do(redis, finished(held)) == 0
        again = await do(redis, dispatch.assign(KEYS, epoch, assignment(arrived, attempt=2)))
        assert again not in (0, -1)
