"""The pages about the wire say what the code does, and every line in them runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dispatcher.resp import Connection, Failure

DOCS = Path(__file__).parents[2] / "docs"
LINES = re.findall(r"^```\n(.*?)```", (DOCS / "redis-cli.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in LINES for line in block.splitlines()]


def test_the_wire_page_is_not_stale():
    """Made anew from the code it is the same; else run `python docs/wire_page.py`."""
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import wire_page; print(wire_page.page(), end='')",
        ],
        cwd=DOCS,
        capture_output=True,
        text=True,
        check=True,
    )

    assert made.stdout == (DOCS / "WIRE.md").read_text()


def test_there_are_ten_looks():
    """Ten blocks, whatever number of lines."""
    assert len(LINES) == 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_line_runs(command, every_server):
    """No line of the page is refused by a server where a pool has begun to work."""
    with Connection(every_server, timeout_s=5) as connection:
        connection.call("XGROUP", "CREATE", "hg:{default}:requests", "dispatcher", "0", "MKSTREAM")

        reply = connection.call(*shlex.split(command))

    assert not isinstance(reply, Failure), reply
