"""One hand-over from end to end over every way to reach a Redis: Cluster, Sentinel, TLS, an ACL user."""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from byhand import PlayedWorker
from certificates import Authority
from servers import BINARIES

from dispatcher.node import Node
from dispatcher.streams import producer
from dispatcher.streams.connection import Connection, Where
from scheduler.errors import StreamError
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.settings import Settings
from scheduler.wire.client import Request

LIMIT_S = 20
PASSWORD = "s3cret"

EVERYBODY = "~hg:{*}:* +@connection +info +time +function|load +fcall"
"Find out whom one talks to, load the functions, call them; on the keys of the pools only."

ACL = {
    "client": f"{EVERYBODY} +hget +hset +hgetall +get +set +del +zadd +zcard"
    " +xadd +xdel +xlen +xread +xrange +xrevrange",
    "dispatcher": f"{EVERYBODY} +hget +hmget +hset +get +set +del +pexpire +zadd +zrem"
    " +xadd +xdel +xack +xread +xreadgroup +xrange +xrevrange +xpending +xclaim +xautoclaim"
    " +xtrim +xinfo +xgroup",
    "worker": f"{EVERYBODY} +hget +hmget +hset +get +del +pexpire +zadd +zrem"
    " +xadd +xdel +xack +xlen +xread +xreadgroup +xrange +xpending +xclaim +xautoclaim +xinfo +xgroup",
}
"What each role may do, and no more: a function's commands are checked as its caller's."


def has_tls(binary: Path) -> bool:
    """Whether this server was built with TLS: then it needs OpenSSL's library."""
    linked = subprocess.run(["ldd", binary], capture_output=True, check=False)
    return b"libssl" in linked.stdout


def free_port() -> int:
    # Under 55,536, so that a cluster's bus port, 10,000 higher, exists.
    for port in range(20_000 + os.getpid() % 10_000, 55_000, 7):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@contextlib.contextmanager
def serving(binary: Path, directory: Path, *flags: str, is_sentinel: bool = False) -> Iterator[int]:
    """A server with these flags; its port."""
    port = free_port()
    config = directory / f"{port}.conf"
    config.write_text(f'port {port}\nbind 127.0.0.1\ndir {directory}\nsave ""\n' + "\n".join(flags))
    words = [str(binary), str(config), *(["--sentinel"] if is_sentinel else [])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if "Ready to accept" in line or "Sentinel ID" in line:
                break
        else:
            pytest.fail(f"{binary.name} did not start")
        yield port
    finally:
        process.kill()
        process.communicate()


async def hand_over(where: Where, pool: str, *, worker: Where | None = None) -> None:
    """Read, plan, hand over, finish, acknowledge: the whole way."""
    redis, theirs = await Connection.connect(where), await Connection.connect(worker or where)
    node, keys = Node(redis, Settings(pool=pool), name="d1"), Keys("hg", pool)
    played = PlayedWorker(theirs, keys)
    task = asyncio.create_task(node.run())
    try:
        async with asyncio.timeout(LIMIT_S), played.beating():
            for n in range(20):
                await submit(redis, keys, f"r{n}")
            assert await played.finish(await played.jobs(20)) == [1] * 20
            assert len(await redis.entries(keys.results)) == 20
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
        """All of a pool lies in one slot, so every move works in a Cluster."""
        with serving(BINARIES[kind], tmp_path, "cluster-enabled yes") as port:
            single = await Connection.connect(Where(url=f"redis://127.0.0.1:{port}"))
            await single.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            async with asyncio.timeout(LIMIT_S):
                while b"cluster_state:ok" not in await info(single):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await single.close()

            await hand_over(Where(url=f"redis+cluster://127.0.0.1:{port}"), pool)

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
    secure = free_port() + 3
    more = (f"tls-port {secure}", "tls-auth-clients no")
    with serving(BINARIES[kind], tmp_path, *flags, *more):
        url = f"rediss://127.0.0.1:{secure}"
        await hand_over(Where(url=url, tls_ca_file=str(ca)), pool)
        with pytest.raises(StreamError, match="certificate verify failed"):
            await Connection.connect(Where(url=url))


async def info(redis: Connection) -> bytes:
    said = await redis.command("CLUSTER", "INFO")
    return (
        said
        if isinstance(said, bytes)
        else b"\n".join(b"%s:%s" % (str(k).encode(), str(v).encode()) for k, v in said.items())
    )


async def test_a_server_older_than_hello():
    """Redis 5 refuses the first word that is said to it; whoever reads the error learns what is wanted."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(b"-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(StreamError, match=r"older than 6\.0; wanted 7\.0 or newer"):
            await Connection.connect(Where(url=f"redis://127.0.0.1:{port}"))
