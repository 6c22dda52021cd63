"""Redis' master killed under load: Sentinel names its replica, what was copied ends once, what was not is said to be lost."""

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
COPIED = 12
PATH = "/v1/completions"
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
                return await client.submit(body, path=PATH, id=request_id, stream=True)
            await asyncio.sleep(0.2)


def cut_off(master):
    """The replica, as by a broken link: its connection ends and no other is taken. The master goes on."""
    ask(master, "ACL", "SETUSER", "default", "-psync", "-sync")
    assert ask(master, "CLIENT", "KILL", "TYPE", "replica") == 1


def body(tokens):
    """Of a request that is answered with so many."""
    engine = {"output_tokens": tokens}
    return {"model": "emulated", "prompt": "far", "max_tokens": 2 * tokens, "vllm_xargs": engine}


class Stream:
    """What was read of an answer, and why no more."""

    def __init__(self, handle):
        self.handle, self.text, self.error = handle, "", None

    async def read(self):
        try:
            async for text in self.handle:
                self.text += text
        except StreamError as error:
            self.error = error


def records_at(port, stream):
    """Whose records lie in this stream of this server."""
    found = ask(port, "XRANGE", stream, "-", "+")
    return [codec.decode(Result, dict(zip(f[::2], f[1::2], strict=True))).id for _, f in found]


async def test_a_new_master_goes_on_where_the_old_one_died(redis, system, pool):
    """Streams under way and all that waits end completed, one record each, and so does what is asked meanwhile."""
    master, replica, url = redis
    async with Client(redis=url, pool=pool) as client:
        handles = [await accepted(client, body(200 + 20 * n), f"r{n}") for n in range(REQUESTS)]
        await until(lambda: len(ask(replica, "XRANGE", client.keys.requests, "-", "+")) == REQUESTS)
        await handles[0].record()

        kill(master)
        handles.append(await accepted(client, body(5), "meanwhile"))

        async with asyncio.timeout(PATIENCE_S):
            ended = [await handle.record() for handle in handles]
    assert {one.outcome for one in ended} == {"completed"}
    told = records_at(replica, client.keys.reply(client.name))
    assert sorted(told) == sorted(handle.id for handle in handles)


async def test_what_the_heir_had_not_got_is_said_to_be_lost(redis, system, pool):
    """Writes of the master's last moments die with it: what was copied ends once all the same, what was not can be sent again.

    What a client has read of lost pieces is followed by the rest or by an error, never by other text.
    """
    master, replica, url = redis
    async with Client(redis=url, pool=pool) as client:
        copied = [
            await client.submit(body(400 + 20 * n), id=f"c{n}", stream=True, path=PATH)
            for n in range(COPIED)
        ]
        early = [await client.submit(body(60), id=f"e{n}", path=PATH) for n in range(4)]
        n_sent = len(copied) + len(early)
        await until(lambda: len(ask(replica, "XRANGE", client.keys.requests, "-", "+")) == n_sent)
        streams = [Stream(handle) for handle in copied]
        reading = [asyncio.create_task(one.read()) for one in streams]
        await until(lambda: all(one.text for one in streams))

        cut_off(master)
        lost = [
            await client.submit(body(2000), id=f"l{n}", stream=True, path=PATH) for n in range(4)
        ]
        answered = [await client.submit(body(5), id=f"a{n}", path=PATH) for n in range(4)]
        for handle in (*early, *answered):
            assert (await handle.record()).outcome == "completed"
        kill(master)

        async with asyncio.timeout(PATIENCE_S):
            for handle in copied:
                record = await handle.record()
                assert (record.outcome, record.reason) == ("completed", ""), record
            for handle in lost:
                with pytest.raises(StreamError, match="lost"):
                    await handle.record()
            again = [await accepted(client, body(5), handle.id) for handle in lost]
            for handle in again:
                assert (await handle.record()).outcome == "completed"
            await asyncio.gather(*reading)
        for handle, stream in zip(copied, streams, strict=True):
            whole = (await handle).text
            assert whole.startswith(stream.text) if stream.error else whole == stream.text
        # Of whom only the end was lost it is written again, once, whoever has read the first.
        ids = sorted(handle.id for handle in (*copied, *early, *again))
        reply = client.keys.reply(client.name)
        await until(lambda: len(records_at(replica, reply)) >= len(ids))
    assert sorted(records_at(replica, reply)) == ids
