"""A real life of a pool, recorded and lived again: cancelled, killed and taken over, and the same commands (I5)."""

import asyncio
import contextlib
import gzip
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from hand import until
from stacks import HEADGATE, up

from dispatcher.cli import recordings
from dispatcher.client import Client
from scheduler.errors import RequestCancelled
from scheduler.sim import story

SETTINGS = """
[objectives.chat]
ttft_ms = 3000

[lease]
leader_s = {lease_s}
worker_s = {lease_s}
beat_s = 0.2

[loop]
snapshot_every_s = 0.5
journal = "{journal}"
"""
REQUESTS = 60
LONG_S = 20.0
"A lease that no busy machine lets run out: one leader, one journal, nobody lost."


def headgate(*words):
    """A command to its end."""
    return subprocess.run(
        [HEADGATE, *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )


@contextlib.contextmanager
def running(directory, *words, lease_s=1.0):
    """A pool of these engines whose dispatchers keep a journal."""
    config = directory / "settings.toml"
    config.write_text(SETTINGS.format(journal=directory / "journal", lease_s=lease_s))
    with up(directory, *words, "--config", config) as ready:
        yield ready


def journalled(directory):
    """All that is written by now."""
    return b"".join(path.read_bytes() for path in directory.rglob("*.jsonl"))


async def lived(ready, config):
    """Sixty requests; one is cancelled, then a worker and the leader are killed under load."""
    async with Client(redis=ready["redis"], pool=ready["pool"]) as client:
        handles = [
            await client.submit(
                {
                    "model": "emulated",
                    "prompt": f"recorded secret {n} " * (1 + n * 7 % 90),
                    "max_tokens": 800,
                    "vllm_xargs": {"output_tokens": 20 + n * 11 % 300},
                },
                path="/v1/completions",
                objective="chat",
                session=f"s{n % 5}",
            )
            for n in range(REQUESTS)
        ]
        longest = handles[54]  # 314 tokens: it cannot have ended yet
        assert await longest.cancel()
        await handles[0].record()
        os.kill(ready["pids"]["worker-1"], signal.SIGKILL)
        await handles[1].record()
        # What has happened but is not written yet goes down with the leader.
        await until(lambda: b'"control":' in journalled(config.with_name("journal")))
        await until(lambda: client.connection.command("EXISTS", client.keys.snapshot))
        os.kill(ready["pids"]["dispatcher"], signal.SIGKILL)
        ends = await asyncio.gather(
            *(handle.record() for handle in handles), return_exceptions=True
        )
        copy = Path(ready["logs"]) / "streams.jsonl"
        found = await asyncio.to_thread(
            headgate, "record", copy, "--redis", ready["redis"], "--config", config
        )
        assert found.returncode == 0, found.stderr
    assert sum(isinstance(end, RequestCancelled) for end in ends) <= 1
    return copy


async def drained(ready, config):
    """Forty requests; half way an endpoint is drained. The copy of the pool's streams."""
    words = ("--redis", ready["redis"], "--config", config)
    async with Client(redis=ready["redis"], pool=ready["pool"]) as client:
        handles = []
        for n in range(40):
            body = {"model": "emulated", "prompt": f"a prompt {n} " * 100, "max_tokens": 20}
            handles.append(await client.submit(body, path="/v1/completions"))
            if n == 20:
                found = await asyncio.to_thread(headgate, "drain", "a100-2", *words)
                assert found.returncode == 0, found.stderr
        await asyncio.gather(*(handle.record() for handle in handles))
        copy = config.with_name("streams.jsonl")
        found = await asyncio.to_thread(headgate, "record", copy, *words)
        assert found.returncode == 0, found.stderr
    return copy


async def given_up(ready, config):
    """Twenty requests, of which three are taken away in the midst of long answers. The copy of the pool's streams."""
    words = ("--redis", ready["redis"], "--config", config)
    async with Client(redis=ready["redis"], pool=ready["pool"]) as client:
        handles = []
        for n in range(20):
            body = {
                "model": "emulated",
                "prompt": f"a prompt {n} " * 100,
                "max_tokens": 4000,
                "vllm_xargs": {"output_tokens": 3000 if n % 8 == 0 else 300},
            }
            handles.append(await client.submit(body, path="/v1/completions", stream=True))
        for handle in handles[::8]:
            await anext(aiter(handle))
            assert await handle.cancel()
        await asyncio.gather(*(handle.record() for handle in handles), return_exceptions=True)
        copy = config.with_name("streams.jsonl")
        found = await asyncio.to_thread(headgate, "record", copy, *words)
        assert found.returncode == 0, found.stderr
    return copy


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """The journals of a life, oldest reign first, and the copy of its streams."""
    directory = tmp_path_factory.mktemp("life")
    with running(directory, "--emulate", "2", "--workers", "2") as ready:
        copy = asyncio.run(lived(ready, directory / "settings.toml"))
    return sorted((directory / "journal").rglob("*.jsonl")), copy


@pytest.fixture(scope="module")
def told(life):
    """Everything that the journals say happened."""
    lines = []
    for path in life[0]:
        with recordings.opened(path) as found:
            lines += found.lines
    return lines


class TestExact:
    @pytest.mark.timeout(300)
    def test_every_reign_is_lived_again(self, life, told):
        """I5: a cancel, a dead worker and a takeover among the facts, and every command of every reign the same."""
        journals, _ = life
        assert len(journals) >= 2
        assert any(line.control is not None for line in told)
        assert any(line.recovered is not None for line in told)
        assert any(line.restored is not None for line in told)
        assert any(b'"reclaim"' in bytes(line.decided) for line in told)

        for path in journals:
            found = headgate("replay", path)
            assert found.returncode == 0, found.stdout + found.stderr
            assert found.stdout.startswith("the same: ")

    def test_no_prompt_is_in_it(self, life):
        """Bodies stay out of journals and copies."""
        for path in (*life[0], life[1]):
            assert b"secret" not in path.read_bytes()

    def test_a_changed_setting_says_where_it_matters(self, life):
        """Exit 1, and the turn, command and field that come otherwise."""
        path = max(life[0], key=lambda one: one.stat().st_size)

        found = headgate("replay", path, "--set", "plan.commit_window_s=0.001")

        assert found.returncode == 1
        assert found.stdout.startswith("differs in turn ")
        assert "  recorded: " in found.stdout
        assert "  replayed: " in found.stdout

    def test_what_is_cut_or_foreign_is_told_so(self, life, tmp_path):
        """A cut file is compared as far as it goes; what is none is refused, packed or not."""
        whole = max(life[0], key=lambda one: one.stat().st_size).read_bytes()
        cut, packed, foreign = (tmp_path / name for name in ("cut", "packed.gz", "foreign"))
        cut.write_bytes(whole[: len(whole) // 2])
        packed.write_bytes(gzip.compress(whole)[:-1000])
        foreign.write_text('{"trace": "mine"}\n')

        for path in (cut, packed):
            found = headgate("replay", path)
            assert found.returncode == 0, found.stderr
            assert "no last line" in found.stderr
        for path, reason in ((foreign, "is no recording"), (tmp_path / "no", "No such file")):
            found = headgate("replay", path)
            assert found.returncode == 2
            assert reason in found.stderr
            assert "Traceback" not in found.stderr


class TestPolicies:
    @pytest.mark.parametrize("which", ["journal", "copy"])
    def test_others_are_asked_about_the_same_arrivals(self, life, tmp_path, which):
        """`--policy` writes what `simulate` writes, on a fleet fitted from the recording; `compare` reads it."""
        path = max(life[0], key=lambda one: one.stat().st_size) if which == "journal" else life[1]
        out = tmp_path / "out.json"

        found = headgate("replay", path, "--policy", "plan,round-robin", "--json", out, "--jobs", 1)

        assert found.returncode == 0, found.stderr
        cells = json.loads(out.read_text())
        assert [one["policy"] for one in cells] == ["plan", "round-robin"]
        assert all(one["n"] >= (REQUESTS if which == "copy" else 10) for one in cells)
        assert "as it was: " in found.stdout
        compared = headgate("compare", out, "--baseline", "round-robin")
        assert compared.returncode == 0, compared.stderr

    def test_a_parted_pool_is_asked_again_and_its_drain_too(self, tmp_path):
        """One prefills for two, of which one is drained meanwhile: its journal and its streams tell the lab all of it."""
        words = ("--emulate", "3", "--profiles", "a100", "--roles", "prefill,decode,decode")
        with running(tmp_path, *words, lease_s=LONG_S) as ready:
            copy = asyncio.run(drained(ready, tmp_path / "settings.toml"))

        for path in (*(tmp_path / "journal").rglob("*.jsonl"), copy):
            found = headgate("replay", path, "--policy", "recorded,round-robin", "--jobs", 1)
            assert found.returncode == 0, found.stderr
            assert "as it was: 40 of 40 completed" in found.stdout
            refused = headgate("replay", path, "--policy", "random", "--jobs", 1)
            assert refused.returncode == 2
            assert "does not part prefill from decode" in refused.stderr
            with recordings.opened(path) as told:
                lives = story.read(told.lines, is_copy=told.head.seed is None)
            assert lives.prefills
            assert [(who, how) for _, who, how in lives.drains] == [("a100-2", True)]

    def test_who_gave_up_gives_up_again(self, tmp_path):
        """Under every policy, from the journal and from the streams, after the same time."""
        with running(tmp_path, "--emulate", "2", lease_s=LONG_S) as ready:
            copy = asyncio.run(given_up(ready, tmp_path / "settings.toml"))

        out = tmp_path / "out.json"
        for path in (*(tmp_path / "journal").rglob("*.jsonl"), copy):
            words = ("--policy", "recorded,round-robin,fcfs", "--json", out, "--jobs", 1)
            found = headgate("replay", path, *words)
            assert found.returncode == 0, found.stderr
            assert "as it was: 17 of 20 completed, 3 cancelled, 100.0% on time" in found.stdout
            assert "3 requests were cancelled" in found.stderr
            for cell in json.loads(out.read_text()):
                assert (cell["n"], cell["n_cancelled"]) == (20, 3)

    def test_a_copy_of_the_streams_cannot_be_repeated(self, life):
        """It says what is missing and which setting brings it."""
        found = headgate("replay", life[1])

        assert found.returncode == 2
        assert "loop.journal" in found.stderr
