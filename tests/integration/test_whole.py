"""The whole system as a user starts it: one command, four emulated engines, every way in and every way to end."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from dispatcher.client import Client
from scheduler import codec
from scheduler.errors import RequestCancelled, RequestExpired
from scheduler.wire.worker import Result

HEADGATE = Path(sys.executable).with_name("headgate")


def started(directory, *words):
    """`headgate up` in the background, and what it said when all was ready."""
    process = subprocess.Popen(
        [HEADGATE, "up", "--emulate", "4", "--json", "--directory", directory, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/dev/null"},
    )
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    return process, json.loads(line)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def all_gone(pids):
    async with asyncio.timeout(30):
        while any(map(is_alive, pids)):  # noqa: ASYNC110  a stranger's end has no event
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """One system for all tests of this file."""
    directory = tmp_path_factory.mktemp("up")
    config = directory / "settings.toml"
    config.write_text("[objectives.quick]\nttft_ms = 5000\n")
    process, ready = started(directory, "--config", config)
    yield ready
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert not any(map(is_alive, ready["pids"].values()))


@pytest.fixture
async def client(system):
    """A client of it."""
    async with Client(redis=system["redis"], pool=system["pool"]) as one:
        yield one


def asks(text="tell me of rivers", output_tokens=8, **more):
    """A body whose emulated answer has a known length."""
    hint = {"output_tokens": output_tokens}
    body = {"model": "emulated", "prompt": text, "max_tokens": 2 * output_tokens}
    return body | {"vllm_xargs": hint} | more


async def by_hand(client, fields):
    """An entry as redis-cli would add it, and the terminal record it gets."""
    entry = await client.connection.add(client.keys.requests, fields)
    wanted = (fields.get("id"), entry)  # an id that cannot be one is answered under the entry's
    after = "0-0"
    async with asyncio.timeout(20):
        while True:
            came = await client.connection.read(
                {client.keys.results: after}, count=100, block_s=1.0
            )
            for after, raw in came.get(client.keys.results, []):  # noqa: B007  read on from there
                if raw[b"id"].decode() in wanted:
                    return codec.decode(Result, raw)


class TestReady:
    def test_one_line_says_what_runs_where(self, system):
        """Redis, pool, models, endpoints, metrics and processes."""
        assert system["models"] == ["emulated"]
        assert {one["hardware"] for one in system["endpoints"]} == {"h100", "a100", "l40s", "a30"}
        assert {"dispatcher", "worker-0", "redis"} <= system["pids"].keys()
        assert {"dispatcher", "worker-0", "door"} <= system["metrics"].keys()
        for url in system["metrics"].values():
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert b"headgate_" in answer.read()


class TestFrozen:
    async def test_the_standby_takes_over(self, system, client):
        """A frozen leader answers nobody; within its lease the standby does."""
        os.kill(system["pids"]["dispatcher"], signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):
                answer = await (await client.submit(asks()))
        finally:
            os.kill(system["pids"]["dispatcher"], signal.SIGCONT)

        assert answer.record.output_tokens == 8


class TestWaysIn:
    async def test_submit(self, client):
        """An answer with its promises judged."""
        answer = await (await client.submit(asks(), ttft_s=5.0, tpot_s=1.0))

        assert answer.text
        assert answer.record.output_tokens == 8
        assert answer.on_time is True

    async def test_an_objective_of_the_settings_file(self, client):
        """Every role that `up` starts reads the file that `up` was given."""
        answer = await (await client.submit(asks(), objective="quick"))

        assert answer.on_time is True

    async def test_stream(self, client):
        """Pieces come before the end, and joined they are the answer."""
        handle = await client.submit(asks(output_tokens=40, stream=True))
        pieces = [text async for text in handle]

        assert len(pieces) > 1
        assert "".join(pieces) == (await handle).text

    async def test_a_long_prompt(self, client):
        """Through the claim check to the engine and back."""
        answer = await (await client.submit(asks("river " * 2000)))

        assert answer.record.prompt_tokens == 3000

    async def test_chat(self, client):
        """The other face."""
        body = {"model": "emulated", "messages": [{"role": "user", "content": "hi"}]}

        answer = await (await client.submit(body | {"max_tokens": 4}))

        assert answer.body["object"] == "chat.completion"

    async def test_by_hand(self, client):
        """A plain XADD with the three fields a person types."""
        record = await by_hand(
            client, {"model": "emulated", "body": json.dumps(asks()), "path": "/v1/completions"}
        )

        assert record.outcome == "completed"

    async def test_a_batch(self, system, tmp_path):
        """Through the command, all lines answered."""
        lines = [
            {"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": asks()}
            for n in range(30)
        ]
        (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))

        ran = await asyncio.create_subprocess_exec(
            *(HEADGATE, "batch", str(tmp_path / "in"), str(tmp_path / "out")),
            *("--redis", system["redis"], "--pool", system["pool"]),
            stderr=subprocess.PIPE,
        )
        _, err = await ran.communicate()

        assert ran.returncode == 0, err
        answered = {
            json.loads(line)["custom_id"] for line in (tmp_path / "out").read_text().splitlines()
        }
        assert answered == {f"c{n}" for n in range(30)}


class TestEnds:
    async def test_cancel_reaches_the_engine(self, client):
        """A request of minutes ends as cancelled while it runs."""
        handle = await client.submit(asks(output_tokens=20_000, stream=True), id="long")
        await anext(aiter(handle))

        assert await handle.cancel()
        with pytest.raises(RequestCancelled):
            async with asyncio.timeout(20):
                await handle

    async def test_a_deadline_that_passes(self, client):
        """Expired, at the latest a little after its time."""
        handle = await client.submit(asks(output_tokens=20_000), deadline_s=0.5)

        with pytest.raises(RequestExpired):
            async with asyncio.timeout(20):
                await handle

    @pytest.mark.parametrize(
        ("fields", "outcome", "reason"),
        [
            pytest.param({"body": "{}"}, "invalid", "model", id="no model"),
            pytest.param(
                {"model": "emulated", "body": "{}", "ttft_ms": "soon"},
                "invalid",
                "ttft_ms",
                id="no number",
            ),
            pytest.param(
                {"model": "emulated", "body": "{}", "ttft_ms": "-5"},
                "invalid",
                "ttft",
                id="promise",
            ),
            pytest.param(
                {"model": "emulated", "body": "{}", "path": "/etc"}, "invalid", "path", id="path"
            ),
            pytest.param(
                {"model": "emulated", "body": "{}", "id": "a b"}, "invalid", "id", id="bad id"
            ),
            pytest.param({"model": "emulated", "body": "no json"}, None, "", id="no json"),
            pytest.param({"model": "emulated"}, None, "", id="no body"),
            pytest.param(
                {"model": "emulated", "body": '{"prompt": 7}', "path": "/v1/completions"},
                None,
                "",
                id="the engine refuses",
            ),
            pytest.param(
                {"model": "emulated", "body": "{}", "objective": "unheard"},
                "invalid",
                "objective",
                id="objective",
            ),
            pytest.param({"stray": "x"}, "invalid", "model", id="stray"),
        ],
    )
    async def test_bad_inputs_get_their_record(self, client, fields, outcome, reason):
        """Nothing vanishes: a terminal record that says what is wrong."""
        record = await by_hand(client, fields)

        assert record.outcome in ((outcome,) if outcome else ("invalid", "failed"))
        assert reason in record.reason
        assert record.reason


class TestEnd:
    async def test_nobody_outlives_a_killed_parent(self, tmp_path):
        """SIGKILL to `up`: the kernel ends every child, Redis too."""
        process, ready = await asyncio.to_thread(started, tmp_path)
        pids = list(ready["pids"].values())
        with contextlib.closing(process.stdout), contextlib.closing(process.stderr):
            process.kill()
            process.wait()

            await all_gone(pids)

    async def test_a_killed_redis_comes_back_with_what_it_held(self, tmp_path):
        """The private Redis too is started again where it was, and who runs meanwhile loses nothing."""
        process, ready = await asyncio.to_thread(started, tmp_path, "--drain-s", "0")
        try:
            async with Client(redis=ready["redis"], pool=ready["pool"]) as client:
                handle = await client.submit(asks(output_tokens=100, stream=True))
                tokens = aiter(handle)
                first = await anext(tokens)

                os.kill(ready["pids"]["redis"], signal.SIGKILL)

                async with asyncio.timeout(30):
                    text = first + "".join([piece async for piece in tokens])
                    assert (await handle).text == text
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        assert "redis ended, starting it again" in err
        assert process.returncode == 0

    async def test_who_dies_is_started_again(self, tmp_path):
        """The worker killed: another takes its place, and requests are answered again."""
        process, ready = await asyncio.to_thread(started, tmp_path, "--drain-s", "0")
        try:
            os.kill(ready["pids"]["worker-0"], signal.SIGKILL)
            async with Client(redis=ready["redis"], pool=ready["pool"]) as client:
                async with asyncio.timeout(30):
                    answer = await (await client.submit(asks()))
            assert answer.text
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        assert "worker-0 ended with -9, starting it again" in err
        assert process.returncode == 0
