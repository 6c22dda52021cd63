"""The commands of who hands in requests and who watches them, as a person runs them."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import pytest
from played import ENDPOINT, Played

from dispatcher.client import Client
from dispatcher.streams import sidecar
from scheduler.wire.worker import Beat

HEADGATE = Path(sys.executable).with_name("headgate")


@pytest.fixture
def headgate(redis_url, pool):
    """Run the installed command to its end, on this test's pool."""

    async def run(*words, stdin=b""):
        ran = await asyncio.create_subprocess_exec(
            *(HEADGATE, *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "HOME": "/nonexistent",
                "HEADGATE_REDIS_URL": redis_url,
                "HEADGATE_POOL": pool,
            },
        )
        out, err = await ran.communicate(stdin)
        return ran.returncode, out.decode(), err.decode()

    return run


class TestSubmit:
    async def test_the_answer_is_on_stdout(self, played, headgate):
        """And the talk about it on stderr."""
        code, out, err = await headgate("submit", "hello river", "--model", "llama", "--id", "r1")

        assert (code, out) == (0, "hello river \n")
        assert err.startswith("r1: completed on a100-0, first token after 250 ms")

    async def test_tokens_as_they_come(self, played, headgate):
        """Joined they are the answer; a body may come from a pipe."""
        body = b'{"model": "llama", "prompt": "a b c"}'

        code, out, _ = await headgate("submit", "--body", "-", "--stream", stdin=body)

        assert (code, out) == (0, "a b c \n")

    @pytest.mark.parametrize("command", ["submit", "batch"])
    async def test_that_nobody_leads_is_said(self, redis_url, pool, tmp_path, command):
        """Who waits for what no dispatcher reads learns it, and gets the answer once one does."""
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
        source = tmp_path / "in.jsonl"
        source.write_text(json.dumps(line | {"body": {"model": "llama", "prompt": "hi"}}))
        words = {
            "submit": ("hi", "--model", "llama"),
            "batch": (source, tmp_path / "out.jsonl"),
        }
        running = await asyncio.create_subprocess_exec(
            *(HEADGATE, command, *words[command], "--redis", redis_url, "--pool", pool),
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

        async with asyncio.timeout(60):
            said = (await running.stderr.readline()).decode()
            played = await Played.start(redis_url, pool)
            while not await played.turn(block_s=1.0):
                pass
            await running.communicate()
        await played.close()

        assert said.startswith(f"nobody leads pool {pool!r}: ")
        assert running.returncode == 0

    async def test_json_is_the_record(self, played, headgate):
        """For machines: one line with the parsed body."""
        code, out, _ = await headgate("submit", "hi", "--model", "llama", "--json")

        assert code == 0
        assert json.loads(out)["body"]["choices"][0]["text"] == "hi "

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            pytest.param(["submit"], "a prompt or --body FILE is wanted", id="nothing"),
            pytest.param(["submit", "hi"], "field 'model' is None", id="no model"),
            pytest.param(["submit", "--body", "/no/such"], "cannot be read", id="no file"),
            pytest.param(["submit", "--body", "/dev/zero"], "is over 16777216 bytes", id="no end"),
            pytest.param(["status", "nobody"], "'nobody' is not known", id="status"),
            pytest.param(["explain", "nobody"], "'nobody' is not known", id="explain"),
            pytest.param(["cancel", "nobody"], "'nobody' is not known", id="cancel"),
            pytest.param(["drain", "nowhere"], "endpoint 'nowhere' is not known", id="drain"),
            pytest.param(["resume", "nowhere"], "endpoint 'nowhere' is not known", id="resume"),
            pytest.param(["dead", "requeue"], "wants one ID or --all", id="requeue"),
            pytest.param(["dead", "show", "x"], "'x' is not among the dead", id="dead"),
            pytest.param(["batch", "/no/in", "/no/out"], "batch '/no/in' cannot", id="batch"),
            pytest.param(["up"], "wanted --emulate N or --engine", id="up"),
        ],
    )
    async def test_a_mistake_is_one_line_and_exit_2(self, headgate, words, message):
        """Nothing on stdout, no traceback, the thing named."""
        code, out, err = await headgate(*words)

        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err


class TestWatch:
    async def test_a_failed_request_is_explained_listed_and_brought_back(self, played, headgate):
        """From its end in `dead` to a new entry in `requests`."""
        code, out, err = await headgate(
            "submit", "x", "--model", "llama", "--tenant", "fail", "--id", "r1"
        )
        assert (code, out) == (2, "")
        assert "request 'r1' failed: as the test wants" in err

        _, told, _ = await headgate("explain", "r1")
        _, listed, _ = await headgate("dead")
        _, shown, _ = await headgate("dead", "show", "r1")
        code, requeued, _ = await headgate("dead", "requeue", "--all")

        assert "to a100-0, attempt 1" in told
        assert all(re.match(r" \+\d+ ms|r1: failed|  ", line) for line in told.splitlines()), told
        assert "candidates, seconds to first token: a100-0=0.020, l40s-0=0.080" in told
        assert "as the test wants" in listed
        assert "tenant fail" in shown
        assert (code, requeued) == (0, "r1\n")
        assert len(await played.connection.entries(played.keys.requests)) == 2

    async def test_the_pool_at_one_glance(self, played, headgate):
        """Endpoints, who leads, what waits and what it came to."""
        epoch = await played.do(sidecar.join(played.keys, ENDPOINT, "w1"))
        beat = Beat(endpoint=ENDPOINT, epoch=epoch, hardware="a100", running=3, kv_usage=0.5)
        await played.do(sidecar.beat(played.keys, beat, lease_s=3))
        await headgate("submit", "hi", "--model", "llama", "--id", "done")
        await headgate("submit", "hi", "--model", "llama", "--tenant", "hold", "--no-wait")

        _, shown, _ = await headgate("status")
        _, raw, _ = await headgate("status", "--json")
        _, one, _ = await headgate("status", "done")

        found = json.loads(raw)
        assert found["leader"] == "d1"
        assert found["outcomes"] == {"completed": 1}
        assert found["endpoints"][0]["jobs"] == 1
        assert found["oldest_s"] > 0
        assert "a100-0" in shown
        assert "50%" in shown
        assert "completed" in one

    async def test_stray_entries_do_not_hide_the_pool(self, played, headgate):
        """Somebody wrote nonsense on every log: the command shows what can be read."""
        epoch = await played.do(sidecar.join(played.keys, ENDPOINT, "w1"))
        await played.do(sidecar.beat(played.keys, Beat(endpoint=ENDPOINT, epoch=epoch), lease_s=3))
        keys = played.keys
        for log in (keys.beats, keys.rewards, keys.decisions, keys.results):
            await played.connection.add(log, {"stray": "1"})
            await played.connection.add(log, {"endpoint": "[/b]", "epoch": "soon"})

        code, shown, err = await headgate("status")

        assert (code, err) == (0, "")
        assert ENDPOINT in shown

    async def test_brackets_are_no_markup(self, played, headgate):
        """A reason is shown as it is, whoever wrote it."""
        dead = {"dead_stream": "s", "dead_entry": "1-0", "dead_reason": "at `$[0]` [/b] :smile:"}
        await played.connection.add(played.keys.dead, dead | {"id": "r1"})

        _, listed, err = await headgate("dead", "list")

        assert "at `$[0]` [/b] :smile:" in listed, err

    async def test_what_others_wrote_steers_no_terminal(self, redis_url, pool, headgate):
        """Clients choose ids: one in colours, or that renames the window, is spelled out; one that is no text is too."""
        dead = {"dead_stream": "s", "dead_entry": "1-0", "dead_reason": "of \x9b2J"}
        async with Client(redis=redis_url, pool=pool) as client:
            for name in (b"\x1b]0;mine\x07", b"\xff\xfe"):
                await client.connection.add(client.keys.dead, dead | {"id": name})

        _, listed, _ = await headgate("dead", "list")
        _, shown, _ = await headgate("dead", "show", "\x1b]0;mine\x07")
        code, again, err = await headgate("dead", "requeue", "--all")

        assert r"\x1b]0;mine\x07" in listed
        assert r"of \x9b2J" in listed
        assert r"id \x1b]0;mine\x07" in shown
        assert (code, err) == (0, "")
        assert again == "\\x1b]0;mine\\x07\n\ufffd\ufffd\n"

    async def test_drain_and_resume_are_controls_on_the_stream(self, played, headgate):
        """Anybody may write them; an endpoint without jobs is empty at once."""
        epoch = await played.do(sidecar.join(played.keys, ENDPOINT, "w1"))
        beat = Beat(endpoint=ENDPOINT, epoch=epoch)
        await played.do(sidecar.beat(played.keys, beat, lease_s=3))

        code, _, err = await headgate("drain", ENDPOINT)
        _, drained, _ = await headgate("status")
        await headgate("resume", ENDPOINT)
        _, resumed, _ = await headgate("status")

        assert f"{ENDPOINT}; headgate resume NAME ends it" in drained
        assert "drained" not in resumed
        controls = await played.connection.entries(played.keys.controls)
        assert (code, err) == (0, "a100-0: empty\n")
        assert [fields[b"action"] for _, fields in controls] == [b"drain", b"resume"]

    async def test_cancel(self, played, headgate):
        """Asked for while it lives: 0; after its end there was nothing to end: 1."""
        await headgate(
            "submit", "hi", "--model", "m", "--tenant", "hold", "--id", "r1", "--no-wait"
        )
        await played.holds(1)

        first, _, _ = await headgate("cancel", "r1")
        await played.finish(played.held[0], outcome="cancelled")
        second, _, err = await headgate("cancel", "r1")

        assert (first, second) == (0, 1)
        assert err == "r1: ended already as cancelled\n"

    async def test_cancel_all_that_a_pipe_names(self, played, headgate):
        """A thousand at once is one command; the count says what became of them."""
        for name in ("r1", "r2"):
            await headgate(
                "submit", "hi", "--model", "m", "--id", name, "--tenant", "hold", "--no-wait"
            )
        await played.holds(2)

        both, _, asked = await headgate("cancel", "-", stdin=b"r1\nr2\n")
        some, _, told = await headgate("cancel", "r1", "nobody")

        assert (both, asked) == (0, "2 asked to end\n")
        assert (some, told) == (1, "1 asked to end, 1 not known\n")


class TestBatch:
    async def test_exit_code_says_whether_all_is_well(self, played, headgate, tmp_path):
        """0 when every line is answered, 1 when one is not, and the count for machines."""
        good = {"custom_id": "a", "body": {"model": "m", "prompt": "hi"}, "url": "/v1/completions"}
        (tmp_path / "good").write_text(json.dumps(good))
        (tmp_path / "bad").write_text(json.dumps(good) + "\n{\n")

        well, out, _ = await headgate(
            "batch", str(tmp_path / "good"), str(tmp_path / "o1"), "--json"
        )
        ill, _, err = await headgate("batch", str(tmp_path / "bad"), str(tmp_path / "o2"))

        assert (well, json.loads(out)["completed"]) == (0, 1)
        assert ill == 1
        assert "bad, line 2: invalid_line" in err
