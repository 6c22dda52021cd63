"""Every role over TLS, with an authority of one's own, to a server that wants a certificate of each of its clients.

The embedded server has no TLS. So a relay in this process has it in its place, as stunnel would: what comes in over
TLS goes on in the clear to the server behind it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import struct
import sys
from pathlib import Path

import openai
import pytest
from certificates import Authority

from dispatcher.client import Client
from scheduler.errors import SettingsError, StreamError

HEADGATE = Path(sys.executable).with_name("headgate")

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")


class Relay:
    """TLS in front of a Redis."""

    def __init__(self, url, authority):
        self._port = int(url.rpartition(":")[2].partition("/")[0])
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_verify_locations(authority.ca_file)
        self._context.load_cert_chain(*authority.issue("server"))
        self._open = set()
        self.seen = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=self._context)
        self.url = f"rediss://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _relay(self, reader, writer):
        self._open.add(asyncio.current_task())
        self.seen += 1
        behind, before = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            ways = [
                asyncio.ensure_future(pump(*way)) for way in ((reader, before), (behind, writer))
            ]
            self._open.update(ways)
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (writer, before):
                one.transport.abort()


async def pump(source, target):
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
async def relay(redis_url, authority):
    async with Relay(redis_url, authority) as one:
        yield one


@pytest.fixture
def environ(relay, authority, pool):
    """What each role is told."""
    crt, key = authority.issue("role")
    return {
        "HEADGATE_REDIS_URL": relay.url,
        "HEADGATE_REDIS_TLS_CA_FILE": str(authority.ca_file),
        "HEADGATE_REDIS_TLS_CERT_FILE": str(crt),
        "HEADGATE_REDIS_TLS_KEY_FILE": str(key),
        "HEADGATE_POOL": pool,
    }


@pytest.fixture
async def system(environ, tmp_path):
    """Dispatchers, worker, emulated engine and door, each told by the environment."""
    process = await asyncio.create_subprocess_exec(
        *(HEADGATE, "up", "--emulate", "1", "--model", "llama", "--json"),
        *("--directory", tmp_path / "up"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environ,
    )
    line = await process.stdout.readline()
    if not line:
        pytest.fail((await process.stderr.read()).decode())
    yield json.loads(line)
    process.terminate()
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()


async def test_every_role(system, relay, environ):
    """Client, dispatcher, worker and door serve a request, streamed and whole; all of it went through the relay."""
    async with Client.from_env(environ) as client:
        body = {"model": "llama", "prompt": "rivers", "max_tokens": 6}
        pieces = [text async for text in await client.submit(body | {"stream": True})]
        answer = await (await client.submit(body))
    async with openai.AsyncOpenAI(
        base_url=f"{system['door']}/v1", api_key="none", max_retries=0
    ) as ai:
        stream = await ai.completions.create(**body, stream=True)
        said = [chunk.choices[0].text async for chunk in stream]

    assert "".join(pieces) == answer.text == "".join(said) != ""
    assert relay.seen > len(system["pids"]) - 2  # all but the engine, at least once each


async def test_the_hand_tool(relay, environ):
    """`headgate redis` shows the same certificate."""
    process = await asyncio.create_subprocess_exec(
        *(HEADGATE, "redis", "PING"),
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environ,
    )
    out, _ = await process.communicate()

    assert out == b"PONG\n"


@pytest.mark.parametrize(
    "forgotten",
    [
        ("HEADGATE_REDIS_TLS_CA_FILE",),
        ("HEADGATE_REDIS_TLS_CERT_FILE", "HEADGATE_REDIS_TLS_KEY_FILE"),
    ],
    ids=["the authority", "the certificate"],
)
async def test_without_either_nobody_gets_in(relay, environ, forgotten):
    """A server that we do not trust, and a client whom it does not, are both refused."""
    left = {name: value for name, value in environ.items() if name not in forgotten}

    with pytest.raises(StreamError):
        async with Client.from_env(left):
            pass


async def test_a_url_without_tls_is_told_of_it(relay, environ):
    """The server closes on whoever speaks in the clear, and says nothing."""
    environ["HEADGATE_REDIS_URL"] = relay.url.replace("rediss://", "redis://")

    with pytest.raises(StreamError, match=r"does it want TLS\? if so: rediss://"):
        async with Client.from_env(environ):
            pass


async def test_a_reset_is_told_of_it(environ):
    """Redis itself does not close but reset: the advice is the same."""

    async def reset(reader, writer):
        await reader.read(1)
        linger = struct.pack("ii", 1, 0)  # not 0 s long: no goodbye
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        environ["HEADGATE_REDIS_URL"] = f"redis://127.0.0.1:{port}"
        with pytest.raises(StreamError, match=r"does it want TLS\? if so: rediss://"):
            async with Client.from_env(environ):
                pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CA_FILE", "redis.tls_ca_file '{path}' holds no certificate"),
        ("CERT_FILE", "redis.tls_cert_file '{path}' does not go with redis.tls_key_file"),
        ("KEY_FILE", "does not go with redis.tls_key_file '{path}'"),
    ],
)
async def test_a_file_that_holds_something_else_is_named(environ, name, message, tmp_path):
    """OpenSSL says what it misses, but not where."""
    path = tmp_path / "wrong"
    path.write_text("no certificate")
    environ[f"HEADGATE_REDIS_TLS_{name}"] = str(path)

    with pytest.raises(StreamError, match=message.format(path=path)):
        async with Client.from_env(environ):
            pass


async def test_half_a_certificate_is_refused(environ):
    """One file of the two is a mistake, and is said before anything connects."""
    del environ["HEADGATE_REDIS_TLS_KEY_FILE"]

    with pytest.raises(SettingsError, match="wanted both or none"):
        Client.from_env(environ)
