"""One hand-over from end to end over every way to reach a Redis: Cluster, Sentinel, TLS, an ACL user."""

import asyncio
import contextlib
import itertools
import subprocess
from pathlib import Path

import pytest
from byhand import PlayedWorker
from certificates import Authority
from hand import until
from redis.crc import key_slot
from servers import BINARIES, ask, free_port, serving

from dispatcher import glance
from dispatcher.delivery import Delivery
from dispatcher.node import Node
from dispatcher.streams import producer
from dispatcher.streams.connection import Connection, Where
from scheduler.errors import StreamError
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.settings import Settings
from scheduler.wire.client import Request

LIMIT_S = 60
PASSWORD = "s3cret"

EVERYBODY = "~hg:{*}:* +@connection +info +time +function|load +fcall"
"Find out whom one talks to, load the functions, call them; on the keys of the pools only."

MANY = 8
"Requests: no more than the plan commits to an endpoint that has not yet begun with any."

ACL = {
    "client": f"{EVERYBODY} +hget +hset +hgetall +get +set +del +zadd +zcard"
    " +xadd +xdel +xlen +xread +xrange +xrevrange",
    "dispatcher": f"{EVERYBODY} +hget +hmget +hset +get +set +del +pexpire +zadd +zrem +zrange"
    " +xadd +xdel +xack +xread +xreadgroup +xrange +xrevrange +xpending +xclaim +xautoclaim"
    " +xtrim +xinfo +xgroup",
    "worker": f"{EVERYBODY} +hget +hmget +hset +get +del +pexpire +zadd"
    " +xadd +xdel +xack +xlen +xread +xreadgroup +xrange +xpending +xclaim +xautoclaim +xinfo +xgroup",
}
"What each role may do, and no more: a function's commands are checked as its caller's."


def has_tls(binary: Path) -> bool:
    """Whether this server was built with TLS: then it needs OpenSSL's library."""
    linked = subprocess.run(["ldd", binary], capture_output=True, check=False)
    return b"libssl" in linked.stdout


async def hand_over(where: Where, pool: str, *, worker: Where | None = None) -> None:
    """Read, plan, hand over, finish, acknowledge: the whole way."""
    redis, theirs = await Connection.connect(where), await Connection.connect(worker or where)
    node, keys = Node(redis, Settings(pool=pool), name="d1"), Keys("hg", pool)
    played = PlayedWorker(theirs, keys)
    task = asyncio.create_task(node.run())
    try:
        async with asyncio.timeout(LIMIT_S), played.beating():
            for n in range(MANY):
                await submit(redis, keys, f"r{n}")
            assert await played.finish(await played.jobs(MANY, limit_s=LIMIT_S)) == [1] * MANY
            assert len(await redis.entries(keys.results)) == MANY
            summary = await redis.command("XPENDING", keys.requests, DISPATCHER_GROUP)
            assert summary["pending"] == 0
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await redis.close()
        await theirs.close()


async def submit(redis: Connection, keys: Keys, request_id: str) -> None:
    request = Request(id=request_id, model="llama", body=b"{}")
    call = producer.submit(keys, request, now=redis.now(), waiting_max=0, body_ttl_s=60)
    assert (await redis.call(call.function, call.keys, call.args))[0] == 1


@pytest.mark.parametrize("kind", list(BINARIES))
class TestWays:
    async def test_cluster(self, kind, tmp_path, pool):
        """All of a pool lies in one slot, so every move works in a Cluster, on whichever of its masters that is."""
        with contextlib.ExitStack() as stack:
            ports = [
                stack.enter_context(
                    serving(
                        BINARIES[kind], tmp_path, "cluster-enabled yes", f"cluster-config-file {n}"
                    )
                )
                for n in range(3)
            ]
            await join(ports)
            where = Where(url=f"redis+cluster://127.0.0.1:{ports[0]}")
            pools = one_of_each(pool)
            for name in pools:
                await hand_over(where, name)

            for port, own in zip(ports, pools, strict=True):
                keys = str(ask(port, "KEYS", "hg:*"))
                assert [name for name in pools if name in keys] == [own]

    async def test_a_slot_that_moves(self, kind, tmp_path, pool):
        """A move said while its keys are on two masters is said until it is done: nothing about it was wrong."""
        with contextlib.ExitStack() as stack:
            ports = [
                stack.enter_context(
                    serving(
                        BINARIES[kind], tmp_path, "cluster-enabled yes", f"cluster-config-file {n}"
                    )
                )
                for n in range(2)
            ]
            await join(ports)
            redis = await Connection.connect(Where(url=f"redis+cluster://127.0.0.1:{ports[0]}"))
            keys = Keys("hg", one_of_each(pool, 2)[0])
            await submit(redis, keys, "r1")
            slot = str(key_slot(keys.requests.encode()))
            begin_moving(slot, *ports)
            move(ports, keys.requests)
            said, waits = producer.cancel(keys, "r1"), asyncio.Event()
            sending = asyncio.create_task(Delivery(redis, on_wait=waits.set).send([said]))
            async with asyncio.timeout(LIMIT_S):
                await waits.wait()
                move(ports, *(key.decode() for key in ask(ports[0], "KEYS", "hg:*")))
                end_moving(slot, *ports)

                assert await sending == [1]
            await redis.close()

    async def test_sentinel(self, kind, tmp_path, pool):
        """The master is found by its name."""
        with serving(BINARIES[kind], tmp_path) as master:
            monitor = f"sentinel monitor main 127.0.0.1 {master} 1"
            with serving(BINARIES[kind], tmp_path, monitor, is_sentinel=True) as port:
                await hand_over(Where(url=f"redis+sentinel://127.0.0.1:{port}/main"), pool)

    async def test_acl(self, kind, tmp_path, pool):
        """Three users, each with its role's commands on the pools' keys only, are enough."""
        users = [f"user {role} on >{PASSWORD} {rules}" for role, rules in ACL.items()]
        with serving(BINARIES[kind], tmp_path, *users, "user default off") as port:
            wheres = {
                role: Where(url=f"redis://127.0.0.1:{port}", username=role, password=PASSWORD)
                for role in ACL
            }
            client = await Connection.connect(wheres["client"])
            keys = Keys("hg", pool + "-other")
            await submit(client, keys, "r1")
            call = producer.cancel(keys, "r1")
            assert await client.call(call.function, call.keys, call.args) == 1
            with pytest.raises(StreamError, match="permission"):
                await client.command("GET", "elsewhere")
            with pytest.raises(StreamError, match="permission"):
                await client.command("FLUSHALL")
            await client.close()

            await hand_over(wheres["dispatcher"], pool, worker=wheres["worker"])

    async def test_a_replica_may_be_looked_at(self, kind, tmp_path, pool):
        """Its functions are its master's; what writes is told where to go."""
        keys = Keys("hg", pool)
        with serving(BINARIES[kind], tmp_path) as master:
            first = await Connection.connect(Where(url=f"redis://127.0.0.1:{master}"))
            await submit(first, keys, "r1")
            with serving(BINARIES[kind], tmp_path, f"replicaof 127.0.0.1 {master}") as port:
                await until(lambda: b"master_link_status:up" in ask(port, "INFO", "replication"))
                redis = await Connection.connect(Where(url=f"redis://127.0.0.1:{port}"))

                assert (await glance.pool(redis, keys)).waiting == 1
                with pytest.raises(StreamError, match=r"read only replica\. \(wanted its master"):
                    await submit(redis, keys, "r2")
                await redis.close()
            await first.close()

    async def test_a_wrong_password(self, kind, tmp_path):
        """It is said at once, with the address and without the password."""
        with serving(BINARIES[kind], tmp_path, "requirepass right") as port:
            where = Where(url=f"redis://:{PASSWORD}@127.0.0.1:{port}")
            with pytest.raises(StreamError) as caught:
                await Connection.connect(where)
            assert str(port) in str(caught.value)
            assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind, binary in BINARIES.items() if has_tls(binary)])
async def test_tls(kind, tmp_path, pool):
    """With an authority of one's own; without it the server is not trusted."""
    authority = Authority(tmp_path)
    crt, key = authority.issue("server")
    ca = authority.ca_file
    flags = (f"tls-cert-file {crt}", f"tls-key-file {key}", f"tls-ca-cert-file {ca}")
    secure = free_port()
    more = (f"tls-port {secure}", "tls-auth-clients no")
    with serving(BINARIES[kind], tmp_path, *flags, *more):
        url = f"rediss://127.0.0.1:{secure}"
        await hand_over(Where(url=url, tls_ca_file=str(ca)), pool)
        with pytest.raises(StreamError, match="certificate verify failed"):
            await Connection.connect(Where(url=url))


async def join(ports: list[int]) -> None:
    """Make one Cluster of these servers, each with its part of the slots."""
    first, *others = ports
    for at, port in enumerate(ports):
        ask(port, "CLUSTER", "ADDSLOTSRANGE", *map(str, _slots(at, len(ports))))
    for port in others:
        ask(port, "CLUSTER", "MEET", "127.0.0.1", str(first))

    def is_whole() -> bool:
        told = [str(ask(port, "CLUSTER", "INFO")) for port in ports]
        return all("state:ok" in one and f"known_nodes:{len(ports)}" in one for one in told)

    await until(is_whole)


def begin_moving(slot: str, source: int, target: int) -> None:
    """From now on its keys may be on either."""
    ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", name_of(source))
    ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", name_of(target))


def move(ports: list[int], *keys: str) -> None:
    """These, from the first to the second."""
    source, target = ports
    ask(source, "MIGRATE", "127.0.0.1", str(target), "", "0", "5000", "KEYS", *keys)


def end_moving(slot: str, source: int, target: int) -> None:
    """All of its keys are there."""
    for port in (target, source):
        ask(port, "CLUSTER", "SETSLOT", slot, "NODE", name_of(target))


def name_of(port: int) -> str:
    """What a Cluster calls this server."""
    return ask(port, "CLUSTER", "MYID").decode()


def one_of_each(pool: str, n: int = 3) -> list[str]:
    """Names of pools, one for each part of the slots."""
    names = (f"{pool}-{number}" for number in itertools.count())
    found: dict[int, str] = {}
    while len(found) < n:
        name = next(names)
        slot = key_slot(name.encode())
        found.setdefault(next(at for at in range(n) if slot <= _slots(at, n)[1]), name)
    return [found[at] for at in range(n)]


def _slots(at: int, n: int) -> tuple[int, int]:
    return 16384 * at // n, 16384 * (at + 1) // n - 1
