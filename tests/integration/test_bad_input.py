"""Each kind of bad input, through the real system: a terminal record with its reason, or one line and exit code 2.

One pool for all: two emulated engines that `headgate up` starts, and four more that each have one vice.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import pytest
from hand import until

from dispatcher.client import Client
from scheduler import codec
from scheduler.errors import RequestFailed, RequestInvalid, RequestRejected, WireError
from scheduler.wire.worker import Result
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings

HEADGATE = Path(sys.executable).with_name("headgate")
VICES = {
    "says-400": {"kind": "status", "status": 400, "count": 100},
    "says-500": {"kind": "status", "status": 500, "count": 100},
    "garbage": {"kind": "garbage", "count": 100},
    "never": {"kind": "silence", "count": 100},
    "gone": {"kind": "clear"},
}
ENVIRON = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "COLUMNS": "200",
    "HEADGATE_LIMITS__BODY_BYTES": "100000",
    "HEADGATE_WORKER__FIRST_TOKEN_S": "0.5",
}
MODEL = "emulated"


class Vicious:
    """Engines that serve a model of their own each, in a thread with a loop of its own."""

    def __init__(self) -> None:
        self.urls: dict[str, str] = {}
        self._here: dict[str, Emulator] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._engines = contextlib.AsyncExitStack()

    def __enter__(self):
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(self, *_):
        self._do(self._engines.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def sin(self, model):
        """From now on it does what it is named for, and nothing else."""
        self._do(self._strike(self.urls[model], VICES[model]))

    def leave(self, model):
        """Its port is closed."""
        self._do(self._here[model].stop())

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _open(self):
        for model in VICES:
            settings = EmulatorSettings(model=model, time_scale=20.0, allow_faults=True)
            engine = Emulator(settings, die=lambda: None)
            self.urls[model] = (await self._engines.enter_async_context(engine)).url
            self._here[model] = engine

    async def _strike(self, url, fault):
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + "/emulator/fault", json=fault) as response,
        ):
            assert response.status == 200


@pytest.fixture(scope="module")
def vicious():
    """The engines with a vice."""
    with Vicious() as engines:
        yield engines


@pytest.fixture(scope="module")
def system(vicious, tmp_path_factory):
    """One system for all tests of this file."""
    engines = [f"--engine={model}={url}" for model, url in vicious.urls.items()]
    directory = tmp_path_factory.mktemp("up")
    process = subprocess.Popen(
        [
            HEADGATE,
            "up",
            "--emulate=2",
            "--json",
            f"--directory={directory}",
            "--drain-s=0",
            *engines,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRON,
    )
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    yield json.loads(line)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "draining\n"), "nobody died of what was sent here"
    assert not [log for log in directory.glob("*.log") if "Traceback" in log.read_text()]


@pytest.fixture
async def client(system):
    """A client of it."""
    async with Client(redis=system["redis"], pool=system["pool"]) as one:
        yield one


def chat(**more):
    """A body that any engine would answer."""
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    return json.dumps(asked | more)


async def by_hand(client, fields):
    """The terminal records of an entry that redis-cli could have added; more than one is a fault."""
    keys = client.keys
    after = await client.connection.newest(keys.results, after="0-0", count=1)
    cursor = after[-1][0] if after else "0-0"
    entry = await client.connection.add(keys.requests, {"model": MODEL, "body": chat()} | fields)
    async with asyncio.timeout(20):
        while True:
            came = await client.connection.read({keys.results: cursor}, count=100, block_s=1.0)
            for cursor, raw in came.get(keys.results, []):  # noqa: B007  read on from there
                if raw[b"id"].decode() in (fields.get("id"), entry):
                    return codec.decode(Result, raw)


class TestRequests:
    @pytest.mark.parametrize(
        ("fields", "outcome", "reason"),
        [
            pytest.param(
                {"model": "nobody"}, "invalid", "'nobody', wanted one served here", id="model"
            ),
            pytest.param({"body": ""}, "invalid", "field 'body' is empty", id="no body"),
            pytest.param({"body": "{"}, "invalid", "body is not JSON", id="unreadable body"),
            pytest.param({"body": b"\xff\xfe"}, "invalid", "not JSON", id="body of no text"),
            pytest.param({"body": "[" * 10_000}, "invalid", "not JSON", id="bottomless body"),
            pytest.param({"body": '{"a":NaN}'}, "invalid", "not JSON", id="no number in the body"),
            pytest.param({"body": chat(messages=7)}, "invalid", "wanted a list", id="no messages"),
            pytest.param({"body": "x" * 100_001}, "invalid", "at most 100000", id="long body"),
            pytest.param({"ttft_ms": "soon"}, "invalid", "'ttft_ms' is 'soon'", id="no number"),
            pytest.param({"tpot_ms": "nan"}, "invalid", "a finite number", id="nan"),
            pytest.param({"expected_tokens": "0"}, "invalid", "1 to 100000000", id="no answer"),
            pytest.param({"priority": "9" * 5000}, "invalid", "whole number", id="huge number"),
            pytest.param({"deadline_ms": "-1"}, "invalid", "more than 0", id="negative deadline"),
            pytest.param({"deadline_at": "1000"}, "expired", "deadline passed", id="past deadline"),
            pytest.param({"objective": "x"}, "invalid", "'objective' is 'x'", id="objective"),
            pytest.param({"reply_to": "hg:{default}:leader"}, "invalid", "reply_to", id="reply_to"),
            pytest.param({"id": "a{b}\n"}, "invalid", "field 'id'", id="id"),
            pytest.param({"tenant": "x" * 10**6}, "invalid", "at most 256", id="long name"),
            pytest.param({"path": "/v1/../x"}, "invalid", "field 'path'", id="path"),
            pytest.param({"traceparent": "0\r\nX-Evil: 1"}, "completed", "", id="header in header"),
            pytest.param(
                {"body": chat(kv_transfer_params={"do_remote_prefill": True})},
                "completed",
                "",
                id="transfer parameters",
            ),
            pytest.param({b"\xff": b"\xff"}, "completed", "", id="unknown field"),
        ],
    )
    async def test_a_record_says_why(self, client, fields, outcome, reason):
        """Nothing vanishes, whatever a hand wrote."""
        record = await by_hand(client, fields)

        assert (record.outcome, reason in record.reason) == (outcome, True), record.reason

    async def test_a_duplicate_is_one_request(self, client):
        """The second entry under an id adds no second answer."""
        first = await by_hand(client, {"id": "twice"})
        await client.connection.add(
            client.keys.requests, {"id": "twice", "model": MODEL, "body": chat()}
        )
        await by_hand(client, {"id": "after"})  # what was written later has ended

        entries = await client.connection.entries(client.keys.results)
        assert first.outcome == "completed"
        assert [raw[b"id"] for _, raw in entries].count(b"twice") == 1

    async def test_the_client_hears_of_it_at_once(self, client):
        """What can never be served is refused before it is sent; what only the pool knows, by its own error."""
        with pytest.raises(WireError, match="'deadline_ms' is '-1000'"):
            await client.submit({"model": MODEL, "prompt": "hi"}, deadline_s=-1.0)
        with pytest.raises(RequestInvalid, match="'objective' is 'x'"):
            await (await client.submit({"model": MODEL, "prompt": "hi"}, objective="x"))


class TestEngines:
    @pytest.mark.parametrize(
        ("model", "status", "reason"),
        [
            pytest.param("says-400", 400, "a fault was asked for", id="4xx"),
            pytest.param("says-500", 500, "a fault was asked for", id="5xx"),
            pytest.param("garbage", 0, "the stream ended inside", id="garbage"),
            pytest.param("never", 0, "the engine was silent for 0.5 s", id="never"),
        ],
    )
    async def test_a_bad_engine_fails_its_requests_with_its_own_words(
        self, vicious, client, model, status, reason
    ):
        """After its attempts, the request fails and lies among the dead; other models go on."""
        vicious.sin(model)

        handle = await client.submit({"model": model, "prompt": "hi"}, max_attempts=1)
        with pytest.raises(RequestFailed, match=reason):
            async with asyncio.timeout(20):
                await handle

        record = await handle.record()
        dead = await client.connection.entries(client.keys.dead)
        assert record.status == status
        assert any(raw.get(b"id") == handle.id.encode() for _, raw in dead)
        assert (await (await client.submit({"model": MODEL, "prompt": "hi"}))).text

    async def test_an_engine_away_is_waited_for_only_so_long(self, vicious, client):
        """Its model was served, so its requests wait; who may not wait is told when to come back."""
        vicious.leave("gone")
        glance = client.keys.endpoint("gone")

        async def is_away():
            return await client.connection.command("HGET", glance, "state") == b"away"

        await until(is_away)

        handle = await client.submit({"model": "gone", "prompt": "hi"}, max_queue_s=0.2)

        with pytest.raises(RequestRejected, match="no endpoint within") as refused:
            async with asyncio.timeout(20):
                await handle
        assert refused.value.retry_after_s > 0


class OldRedis(socketserver.ThreadingTCPServer):
    """A server that speaks RESP, says that it is 6.2, and does nothing else."""

    daemon_threads = True

    class RequestHandlerClass(socketserver.StreamRequestHandler):
        """Answers every command with its version, or with OK."""

        def handle(self):
            while head := self.rfile.readline():
                count = int(head[1:])
                words = [
                    self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2].upper()
                    for _ in range(count)
                ]
                info = b"# Server\r\nredis_version:6.2.14\r\n"
                known = {
                    b"INFO": b"$%d\r\n%s\r\n" % (len(info), info),
                    b"HELLO": b"%1\r\n+version\r\n+6.2.14\r\n",
                }
                self.wfile.write(known.get(words[0], b"+OK\r\n"))

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)


@pytest.fixture(scope="module")
def old_redis():
    """The URL of a Redis that is too old."""
    with OldRedis() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()


@pytest.fixture
def taken():
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refused(*words, **environ):
    """The one line that a command ends with; its exit code is that of a mistake."""
    ran = subprocess.run(
        [HEADGATE, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=ENVIRON | environ,
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.startswith("headgate: "), ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr
    return ran.stderr


class TestCommands:
    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("http://127.0.0.1:1", "scheme is 'http', wanted redis, rediss, unix"),
            ("127.0.0.1:6379", "wanted redis, rediss, unix"),
            ("redis://[", "redis.url is no URL"),
            ("redis://127.0.0.1:many", "not usable"),
            ("redis://127.0.0.1:1", "refused"),
            ("unix:///nowhere", "No such file"),
            ("redis+sentinel://127.0.0.1:1", "names no master"),
            ("redis+cluster://127.0.0.1:1", "cannot be connected"),
            ("redis://127.0.0.1:1/0?foo=bar", "its option is 'foo', wanted one of db, ssl_"),
            ("redis://127.0.0.1:1/zero", "its database is 'zero', wanted a number"),
            (
                "redis+sentinel://127.0.0.1:1,127.0.0.1:2/main",
                "No master found for 'main': not every sentinel answers\n",
            ),
        ],
    )
    def test_a_wrong_redis_url(self, url, message):
        """What is wrong with it, or who does not answer there."""
        assert message in refused("status", "--redis", url)

    def test_tls_to_a_server_without(self, redis_url):
        """What to try, since the server only waits for what it can read."""
        url = redis_url.replace("redis://", "rediss://")

        assert "(does it speak TLS? if not: redis://)" in refused("status", "--redis", url)

    @pytest.mark.parametrize(
        "words",
        [
            pytest.param(["status"], id="status"),
            pytest.param(["submit", "hi", "--model", "m"], id="submit"),
            pytest.param(["up", "--emulate", "1"], id="up"),
        ],
    )
    def test_a_redis_too_old(self, old_redis, words):
        """The version found and the version wanted."""
        assert "is 6.2.14, wanted 7.0 or newer" in refused(*words, "--redis", old_redis)

    @pytest.mark.parametrize(
        "words",
        [
            pytest.param(["emulate", "--port", "{port}"], id="emulate"),
            pytest.param(["door", "--port", "{port}"], id="door"),
            pytest.param(["up", "--emulate", "1", "--door-port", "{port}"], id="up"),
        ],
    )
    def test_a_port_in_use(self, redis_url, taken, words):
        """Which one."""
        said = [word.format(port=taken) for word in words]

        assert str(taken) in refused(*said, HEADGATE_REDIS_URL=redis_url)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            pytest.param(["hi", "--ttft-s", "nan"], "'ttft_ms' is 'nan'", id="nan"),
            pytest.param(["hi", "--deadline-s", "inf"], "'deadline_ms' is 'inf'", id="for ever"),
            pytest.param([b"\xff\xfe"], "cannot be written as JSON", id="no UTF-8"),
            pytest.param(
                ["--body", "/dev/null", "--max-tokens", "3"], "goes with a prompt", id="twice said"
            ),
        ],
    )
    def test_a_request_that_cannot_be(self, redis_url, words, message):
        """It is refused before it is sent."""
        said = refused("submit", "--model", "m", *words, HEADGATE_REDIS_URL=redis_url)

        assert message in said

    @pytest.mark.parametrize(
        "words",
        [
            pytest.param(["emulate"], id="emulate"),
            pytest.param(["door", "--port", "0"], id="door"),
            pytest.param(["dispatcher"], id="dispatcher"),
        ],
    )
    def test_a_ready_file_that_cannot_be(self, redis_url, pool, words):
        """Who waits for it would wait for ever: the service ends and says which."""
        ran = subprocess.run(
            [HEADGATE, *words, "--ready-file", "/proc/nobody/ready"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=ENVIRON | {"HEADGATE_REDIS_URL": redis_url, "HEADGATE_POOL": pool},
        )

        wanted = "headgate: --ready-file is '/proc/nobody/ready', wanted one to write: "
        assert ran.returncode == 2
        assert ran.stderr.splitlines()[-1].startswith(wanted)
        assert "Traceback" not in ran.stderr

    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (["demo", "--load", "nan"], "less than or equal to 100"),
            (["demo", "--rate", "-1"], "greater than or equal to 0.01"),
            (["record", "x", "--last", "inf"], "less than or equal to 1000000000"),
            (["capacity", "--trace", "x", "--rate", "-1"], "greater than or equal to"),
            (["capacity", "--trace", "x", "--keep", "2"], "shares of at most 1"),
            (["drain", "x", "--timeout-s", "nan"], "less than or equal to 1000000000"),
            (["worker", "--metrics-port", "-1"], "greater than or equal to 0"),
        ],
    )
    def test_a_number_of_no_use(self, words, wanted):
        """It is refused as a wrong option, before anything starts."""
        ran = subprocess.run(
            [HEADGATE, *words], capture_output=True, text=True, check=False, env=ENVIRON
        )

        assert (ran.returncode, ran.stdout) == (2, "")
        assert wanted in " ".join(ran.stderr.replace("│", " ").split())

    @pytest.mark.parametrize(
        "words",
        [
            pytest.param(["demo", "--svg", "/proc/nobody/x.svg"], id="demo"),
            pytest.param(["cells", "run", "K3-small", "--out", "/proc/nobody/x"], id="cells"),
        ],
    )
    def test_a_result_that_cannot_be_written(self, words):
        """It is said before the run, not after it."""
        assert "cannot write '/proc/nobody/x" in refused(*words)

    def test_a_directory_that_another_up_holds(self, system):
        """Two of them would write one log, and take each other's endpoints away for good."""
        said = refused("up", "--emulate", "1", "--directory", system["logs"])

        assert "is in use by another headgate up" in said

    def test_a_directory_that_cannot_be(self):
        """Why."""
        said = refused("up", "--emulate", "1", "--directory", "/proc/nobody")

        assert "directory '/proc/nobody' cannot be used: " in said

    def test_a_look_again_and_again_into_a_pipe(self, system):
        """A picture that is drawn over and over is for terminals; a pipe gets one look after another."""
        words = [HEADGATE, "status", "--watch", "--redis", system["redis"]]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRON) as process:
            looks = (line.split()[0] for line in process.stdout if "led by" in line)
            seen = list(itertools.islice(looks, 2))
            process.terminate()

        assert seen == ["pool", "pool"]

    def test_a_certificate_that_is_not_there(self):
        """Which one: OpenSSL does not say."""
        said = refused(
            *("status", "--redis", "rediss://127.0.0.1:1"), HEADGATE_REDIS_TLS_CA_FILE="/nobody"
        )

        assert "redis.tls_ca_file '/nobody' cannot be read: No such file" in said

    def test_a_full_disk_behind_stdout(self):
        """What was asked for cannot be written; that is no reason to show the code."""
        with Path("/dev/full").open("w") as full:
            ran = subprocess.run(
                [HEADGATE, "settings"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=ENVIRON,
            )

        said = "headgate: stdout cannot be written: no space left\n"
        assert (ran.returncode, ran.stderr) == (2, said)

    async def test_who_stops_waiting_is_told_that_the_request_goes_on(self, system, client):
        """Ctrl-C ends the command, not the request: how to follow or end it stands in the last line."""
        process = await asyncio.create_subprocess_exec(
            *(HEADGATE, "submit", "--stream", "--redis", system["redis"], "--id", "left", "--body"),
            "/dev/stdin",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=ENVIRON,
        )
        process.stdin.write(chat(model=MODEL, max_tokens=2000, ignore_eos=True).encode())
        process.stdin.write_eof()
        await process.stdout.read(1)

        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()

        assert process.returncode == 130
        assert err == b"left goes on: headgate status ID, headgate cancel ID\n"
        await client.cancel("left")  # it could still be

    def test_a_setting_nobody_knows(self):
        """With the nearest one that there is."""
        message = refused("status", HEADGATE_LOOP__READ_MX="1")

        assert "loop.read_mx is not a setting; did you mean read_max?" in message
