"""The README does what it says: every block in it is run here, in its order, in one shell's environment."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())

with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    DOOR_PORT = str(_free.getsockname()[1])

pytestmark = pytest.mark.xdist_group("readme")


def blocks(word: str) -> list[str]:
    return [code for _, code in BLOCKS if word in code]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A newcomer's environment: a home of its own, and the command on the path."""
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HEADGATE_", "XDG_"))}
    return kept | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def pool(shell: dict[str, str]) -> Iterator[None]:
    """What `headgate up` of the README leaves running."""
    [code] = blocks("headgate up")
    command = code.splitlines()[-1].replace("8080", DOOR_PORT) + " --json"
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}"], env=shell, cwd=shell["HOME"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert ready.startswith(b"{"), "it ended before it was ready"
    yield
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


def run(code: str, shell: dict[str, str], *words: str) -> str:
    """A block's standard output; it must succeed."""
    done = subprocess.run(
        [*words, code],
        check=False,
        env=shell,
        cwd=shell["HOME"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_two_commands_are_what_ci_runs():
    """`make demo` and `make test` exist, and CI runs both on a clean checkout."""
    [code] = blocks("make demo")
    ci = (ROOT / ".ci/run").read_text()
    for command in code.split("\n")[:2]:
        assert command in ci
        subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, check=True)


@pytest.mark.usefixtures("pool")
class TestBlocks:
    def test_a_request_from_a_shell(self, shell):
        """`headgate submit --stream` prints the answer."""
        [code] = blocks("headgate submit")

        assert len(run(code, shell, "sh", "-ec").split()) > 1

    def test_a_request_from_async_python(self, shell):
        """The script prints the streamed text and who served it."""
        [code] = [code for kind, code in BLOCKS if kind == "python" and "Client.from_env" in code]

        assert "gave the first token after" in run(code, shell, sys.executable, "-c")

    def test_a_request_over_http(self, shell):
        """The official OpenAI client is answered at the door."""
        [code] = blocks("openai import")

        assert len(run(code.replace("8080", DOOR_PORT), shell, sys.executable, "-c").split()) > 1

    def test_a_batch(self, shell):
        """Both lines are answered, by custom_id."""
        [code] = blocks("headgate batch")

        run(code, shell, "sh", "-ec")

        out = Path(shell["HOME"], "out.jsonl").read_text()
        assert '"one"' in out
        assert '"two"' in out

    def test_a_request_by_hand(self, shell):
        """An XADD with a model and a body is enough."""
        [code] = blocks("XADD")

        assert re.search(r"^\d+-0$", run(code, shell, "sh", "-ec"), re.MULTILINE)

    def test_looking_inside(self, shell):
        """Status, the sorted set of who waits, and the dead."""
        [code] = blocks("headgate status")

        assert "h100-0" in run(code, shell, "sh", "-ec")

    def test_one_more_worker(self, shell):
        """A worker beside one more engine joins the pool, and leaves it on SIGTERM."""
        [code] = blocks("headgate worker")
        engine = subprocess.Popen(
            [BIN / "headgate", "emulate", "--model", "llama", "--port", "0"],
            stdout=subprocess.PIPE,
            env=shell,
        )
        assert engine.stdout is not None
        url = re.search(rb'"url": ?"http://127.0.0.1:(\d+)"', engine.stdout.readline())
        assert url is not None
        command = code.strip().replace("8000", url[1].decode())
        worker = subprocess.Popen(
            ["sh", "-c", f"exec {command}"], env=shell, stdout=subprocess.PIPE
        )
        assert worker.stdout is not None
        try:
            assert worker.stdout.readline().startswith(b"{")
            assert "gpu7" in run("headgate status --json", shell, "sh", "-ec")
        finally:
            for process in (worker, engine):
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
                process.stdout.close()


def test_no_block_is_left_out():
    """A new block needs a test of its own here."""
    tested = ("make demo", "headgate up", "headgate submit", "Client.from_env", "headgate batch")
    tested += ("XADD", "headgate status", "headgate worker", "openai import")

    left = [code for _, code in BLOCKS if not any(word in code for word in tested)]

    assert left == []
