"""The official `openai` client at a door before emulated engines; tests/vllm asks the same before real ones."""

import json
import os
import signal
import subprocess

import pytest
from outside import HEADGATE, Facts

pytestmark = pytest.mark.xdist_group("outside")  # one system for all of them


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """`headgate up` with two emulated engines."""
    process = subprocess.Popen(
        [
            *(HEADGATE, "up", "--emulate", "2", "--profiles", "h100", "--json"),
            *("--directory", tmp_path_factory.mktemp("up")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    yield json.loads(line)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


class TestOpenAI(Facts):
    """Every fact of `outside`."""
