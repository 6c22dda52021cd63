"""Fleets of real vLLM servers and of emulated ones, started as a person starts them."""

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from face import Client
from tied import tied

from workers.fleet.cli import in_turn

ROOT = Path(__file__).parents[1]
HEADGATE = Path(sys.executable).with_name("headgate")

PROBES = 21
"Requests from which a server's time to a lone first token is taken."

PROBE_TOKENS = 17


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


@contextlib.contextmanager
def servers(home, count, profiles, *words):
    """Real vLLM servers on the clocks of these GPUs, taken in turn: their names, URLs and hardware."""
    process, found = started(home, str(count), "--profiles", profiles, *words)
    try:
        yield found
    finally:
        ended(process)


@contextlib.contextmanager
def emulators(count, profiles, *words):
    """The same in emulated engines, with the arguments that a fleet gives its servers."""
    as_fleet = ["--block-size", "32", "--max-model-len", "32768", "--scheduling-policy", "priority"]
    hardware = in_turn(count, profiles)
    with contextlib.ExitStack() as stack:
        found = []
        for number, kind in enumerate(hardware):
            command = tied(HEADGATE, "emulate", "--profile", kind, *as_fleet, *words)
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.terminate)
            url = json.loads(process.stdout.readline())["url"]
            name = f"{kind}-{hardware[:number].count(kind)}"
            found.append({"name": name, "url": url, "hardware": kind})
        yield found


async def first_token_s(url):
    """Seconds until an idle server has said a token to `PROBE_TOKENS` tokens that it does not know: the median."""
    found = []
    async with Client(url) as server:
        for number in range(PROBES):
            asked_at = time.perf_counter()
            times = []
            await server.stream(
                prompt=[number, *range(PROBE_TOKENS - 1)],
                max_tokens=1,
                ignore_eos=True,
                on_chunk=lambda _, at=times: at.append(time.perf_counter()),
            )
            found.append(times[0] - asked_at)
    return statistics.median(found)
