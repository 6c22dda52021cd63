"""A fleet of real vLLM servers, started as a person starts it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADGATE = Path(sys.executable).with_name("headgate")


@pytest.fixture(scope="session")
def fleet_home(tmp_path_factory):
    """Models, logs and caches of all fleets of this run."""
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="session")
def fleet(fleet_home):
    """Starts a fleet and says its endpoints; it ends with the returned process."""

    def start(*words):
        process = subprocess.Popen(
            [
                *(HEADGATE, "fleet", "up", *words, "--json", "--stay"),
                *("--venv", ROOT / ".venv-vllm", "--directory", fleet_home),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = process.stdout.readline()
        if not line:
            pytest.fail(process.communicate()[1])
        return process, json.loads(line)["endpoints"]

    return start


def ended(process):
    """SIGTERM, and what it said if it did not end well."""
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 0, talk
