"""A fleet of real vLLM servers, started as a person starts it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tied import tied

ROOT = Path(__file__).parents[1]
HEADGATE = Path(sys.executable).with_name("headgate")


def started(home, *words):
    """`headgate fleet up` in the background, and the endpoints it said."""
    process = subprocess.Popen(
        tied(
            *(HEADGATE, "fleet", "up", *words, "--json", "--stay"),
            *("--venv", ROOT / ".venv-vllm", "--directory", home),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    return process, json.loads(line)["endpoints"]


def ended(process):
    """SIGTERM, and what it said if it did not end well."""
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 0, talk
