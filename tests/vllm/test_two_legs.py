"""Two legs on real vLLM servers: both really compute, and NIXL really carries the KV from one to the other.

Not on emulated clocks: their workers compute nothing, so there is nothing to carry.
"""

import contextlib
import json
import random
import signal
import socket
import subprocess
from pathlib import Path

import aiohttp
import msgspec
import pytest
from fleets import HEADGATE, ROOT
from hand import until
from tied import tied

from dispatcher.cli.explain import told
from dispatcher.client import Client
from workers.fleet import pod

VENV = ROOT / ".venv-vllm"
PROMPT_TOKENS = 1000
N_TOKENS = 24
REQUESTS = 6

PARTED = [("prefill", "p0", "prefilled"), ("decode", "d0", "completed")]
WHOLE = [("whole", "d0", "completed")]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not any(VENV.glob("lib/python*/site-packages/nixl")),
        reason="nixl is not in .venv-vllm: pip install --no-deps nixl==1.5.1 nixl-cu13==1.5.1",
    ),
]


def free_ports(count):
    """So many, each another."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def serving(directory, name, port, side_channel):
    """A server that computes, with a side channel of its own."""
    settings = pod.PodSettings(venv=VENV, directory=directory)
    pod.make_model(settings, "")
    connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    words = pod.arguments(settings, "", [port])
    environ = pod.environment(settings, "", 0) | {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel),
    }
    log = (directory / f"{name}.log").open("wb")
    process = subprocess.Popen(
        tied(VENV / "bin/vllm", *words, "--kv-transfer-config", json.dumps(connector)),
        stdout=log,
        stderr=log,
        env=environ,
        start_new_session=True,
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


async def answers(process, url):
    async def found():
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(url + "/health") as reply:
                return reply.status == 200
        return False

    for _ in range(20):  # 15 s where nothing else runs
        with contextlib.suppress(TimeoutError):
            return await until(found)
    pytest.fail(f"{url} does not answer")


@contextlib.contextmanager
def system(directory, prefill, decode):
    """Declared so that the plan parts long prompts: how fast they are it would learn."""
    link = "link_gbps=50,kv_token_bytes=4096"
    engines = (
        f"--engine=p0={prefill},hardware=h100,roles=prefill,{link}",
        f"--engine=d0={decode},hardware=v100,roles=decode,{link}",
    )
    process = subprocess.Popen(
        tied(HEADGATE, "up", *engines, "--json", "--directory", directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = process.stdout.readline()
    assert line, "the system did not start"
    try:
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


async def alone(url, body):
    """What a server says that nobody helps, twice: computed, and from its own prefix cache."""
    texts = []
    async with aiohttp.ClientSession() as session:
        await session.post(url + "/reset_prefix_cache")
        for _ in range(2):
            async with session.post(url + "/v1/completions", json=body) as response:
                found = msgspec.json.decode(await response.read())
            texts.append(found["choices"][0]["text"])
    return texts


async def ended(client, request_id):
    """Its legs by their rewards, of which the last comes behind the answer."""

    async def found():
        story = await told(client, request_id)
        legs = [(r.leg, r.endpoint, r.outcome) for r in story.rewards]
        return legs if legs and legs[-1][-1] == "completed" else None

    return await until(found)


async def test_what_is_said_in_two_legs_is_what_one_server_says(tmp_path):
    """As equal as a server is to itself: cached or computed, half floats round otherwise, and a tie falls otherwise."""
    rng = random.Random(7)
    ports = free_ports(4)
    with serving(tmp_path, "p0", *ports[:2]) as p, serving(tmp_path, "d0", *ports[2:]) as d:
        await answers(*p)
        await answers(*d)
        with system(Path(tmp_path / "up"), p[1], d[1]) as ready:
            async with Client(redis=ready["redis"], pool=ready["pool"]) as client:
                equal, parted = 0, 0
                for n in range(REQUESTS):
                    body = {
                        "model": pod.COMPUTING_MODEL,
                        "prompt": [rng.randrange(10, 8000) for _ in range(PROMPT_TOKENS)],
                        "temperature": 0,
                        "ignore_eos": True,
                        "max_tokens": N_TOKENS,
                    }
                    handle = await client.submit(body, stream=n % 2 == 0)
                    answer = await handle
                    legs = await ended(client, handle.id)
                    assert legs in (PARTED, WHOLE)
                    parted += legs == PARTED
                    equal += answer.text in await alone(p[1], body)
                assert parted, (
                    "as declared, the first goes in two legs; later it knows that these are alike"
                )
                assert equal >= REQUESTS - 2
