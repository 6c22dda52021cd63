"""Redis' master killed under load: Sentinel names its replica, and everything accepted and copied ends once."""

import asyncio
import contextlib
import os
import re
import signal

import pytest
from hand import until
from servers import BINARIES, ask, serving
from stacks import up

from dispatcher.client import Client
from scheduler import codec
from scheduler.errors import StreamError
from scheduler.wire.worker import Result

pytestmark = pytest.mark.chaos

REQUESTS = 30
PATIENCE_S = 60

WATCHED = ("sentinel down-after-milliseconds main 2000", "sentinel failover-timeout main 6000")
"Not shorter: a busy machine would be taken for a dead master."


@pytest.fixture
async def redis(tmp_path):
    """A master, its replica and a Sentinel that knows both: the master's and the replica's ports, the Sentinel's URL."""
    binary = next(iter(BINARIES.values()))
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(serving(binary, tmp_path))
        copying = (f"replicaof 127.0.0.1 {master}", "dbfilename replica.rdb")
        replica = stack.enter_context(serving(binary, tmp_path, *copying))
        await until(lambda: "state=online" in str(ask(master, "INFO", "replication")))
        monitor = f"sentinel monitor main 127.0.0.1 {master} 1"
        sentinel = stack.enter_context(
            serving(binary, tmp_path, monitor, *WATCHED, is_sentinel=True)
        )
        await until(lambda: ask(sentinel, "SENTINEL", "REPLICAS", "main"))
        yield master, replica, f"redis+sentinel://127.0.0.1:{sentinel}/main"


@pytest.fixture
def system(redis, tmp_path, pool):
    """Two emulated engines, their workers and two dispatchers, over the Sentinel."""
    with up(tmp_path / "up", "--emulate", "2", "--redis", redis[2], "--pool", pool):
        yield


def kill(port):
    """Its process, and nothing is said to anybody."""
    pid = re.search(r"process_id:(\d+)", str(ask(port, "INFO", "server")))[1]
    os.kill(int(pid), signal.SIGKILL)


async def accepted(client, body, request_id):
    """Handed in, however often that must be said: an id is taken once."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(StreamError):
                return await client.submit(body, path="/v1/completions", id=request_id, stream=True)
            await asyncio.sleep(0.2)


async def test_a_new_master_goes_on_where_the_old_one_died(redis, system, pool):
    """Streams under way and all that waits end completed, one record each, and so does what is asked meanwhile."""
    master, replica, url = redis
    async with Client(redis=url, pool=pool) as client:

        def body(tokens):
            engine = {"output_tokens": tokens}
            return {
                "model": "emulated",
                "prompt": "far",
                "max_tokens": 2 * tokens,
                "vllm_xargs": engine,
            }

        handles = [await accepted(client, body(200 + 20 * n), f"r{n}") for n in range(REQUESTS)]
        await until(lambda: len(ask(replica, "XRANGE", client.keys.requests, "-", "+")) == REQUESTS)
        await handles[0].record()

        kill(master)
        handles.append(await accepted(client, body(5), "meanwhile"))

        async with asyncio.timeout(PATIENCE_S):
            ended = [await handle.record() for handle in handles]
    assert {one.outcome for one in ended} == {"completed"}
    records = ask(replica, "XRANGE", client.keys.reply(client.name), "-", "+")
    told = [codec.decode(Result, dict(zip(f[::2], f[1::2], strict=True))).id for _, f in records]
    assert sorted(told) == sorted(handle.id for handle in handles)
