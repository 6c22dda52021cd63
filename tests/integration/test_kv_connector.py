"""The emulated KV connector between two emulated engines: what vLLM's NIXL does, and what goes wrong with it."""

import asyncio
import contextlib

import aiohttp
import msgspec
import pytest
from jumping import JumpingLoop

from scheduler.sim.arguments import EngineSettings
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings, KvExtra, KvTransfer

PARK = {"do_remote_decode": True, "do_remote_prefill": False}


@contextlib.asynccontextmanager
async def engine(*, lease_s=30.0, policy="fail", link_gbps=400.0, time_scale=100.0, **more):
    transfer = KvTransfer(
        kv_load_failure_policy=policy,
        kv_connector_extra_config=KvExtra(kv_lease_duration=lease_s),
        link_gbps=link_gbps,
    )
    settings = EmulatorSettings(
        time_scale=time_scale, kv_transfer=transfer, allow_faults=True, **more
    )
    async with Emulator(settings) as running:
        yield running


def prompt(words=400, seed="a"):
    return " ".join(f"{seed}{n:03}" for n in range(words))


async def ask(emulator, text, *, max_tokens=16, kv=None, stream=False):
    """Status and the answer; of a stream its text, or its error."""
    body = {"model": "emulated", "prompt": text, "max_tokens": max_tokens, "ignore_eos": True}
    body |= {"stream": stream} | ({"kv_transfer_params": kv} if kv else {})
    async with (
        aiohttp.ClientSession() as session,
        session.post(emulator.url + "/v1/completions", json=body) as response,
    ):
        return response.status, await response.read()


async def text(emulator, *words, **more):
    status, raw = await ask(emulator, *words, **more)
    assert status == 200, raw
    return msgspec.json.decode(raw)["choices"][0]["text"]


async def parked(emulator, text):
    status, raw = await ask(emulator, text, max_tokens=1, kv=PARK)
    assert status == 200, raw
    return msgspec.json.decode(raw)["kv_transfer_params"]


async def freed(emulator):
    async with asyncio.timeout(10):
        while emulator.service.engine.kv.used:  # noqa: ASYNC110  nobody says when
            await asyncio.sleep(0.005)


async def test_both_halves_say_what_a_whole_says():
    """And neither keeps anything; nobody but the first computes the prompt."""
    async with engine() as p, engine() as d, engine() as whole:
        expected = await text(whole, prompt())
        kv = await parked(p, prompt())
        assert p.service.engine.kv.used > 0
        assert await text(d, prompt(), kv=kv) == expected
        await freed(p)
        await freed(d)
        assert d.service.engine.counters.steps < whole.service.engine.counters.steps + 2
        assert kv["remote_engine_id"] == p.service.kv_connector.engine_id


async def test_the_transfer_takes_its_time():
    """What a link carries in so long comes no sooner."""
    async with engine() as p, engine(link_gbps=2.0, time_scale=1.0) as d:
        kv = await parked(p, prompt())
        began = asyncio.get_running_loop().time()
        await text(d, prompt(), kv=kv, max_tokens=1)
        took_s = asyncio.get_running_loop().time() - began
        sequence_bytes = 400 * d.service.profile.kv_bytes_per_token
        assert took_s >= sequence_bytes * 8 / 2e9


async def test_a_lease_that_runs_out_frees_the_blocks():
    async with engine(lease_s=0.05) as p:
        await parked(p, prompt())
        await freed(p)
        assert p.service.kv_connector.expired == 1


async def test_kv_that_is_used_after_its_lease_is_another_text():
    """As with the real one: it answers, and nothing says that it is wrong."""
    async with engine(lease_s=0.05) as p, engine() as d:
        kv = await parked(p, prompt())
        await freed(p)
        assert await text(d, prompt(), kv=kv) != await text(d, prompt())


async def test_parameters_of_another_prompt_are_another_text():
    async with engine() as p, engine() as d:
        kv = await parked(p, prompt(seed="b"))
        assert await text(d, prompt(), kv=kv) != await text(d, prompt())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_where_the_other_engine_is_gone_it_is_an_error(stream):
    """Of a stream inside a 200."""
    async with engine() as d:
        async with engine() as p:
            kv = await parked(p, prompt())
        status, raw = await ask(d, prompt(), kv=kv, stream=stream)
        assert status == (200 if stream else 500)
        assert msgspec.json.decode(raw.removeprefix(b"data: ").partition(b"\n")[0])["error"]
        await freed(d)
        assert d.service.kv_connector.failed == 1


async def test_where_the_policy_says_so_it_is_computed_again():
    async with engine(policy="recompute") as d:
        async with engine() as p:
            kv = await parked(p, prompt())
        assert await text(d, prompt(), kv=kv) == await text(d, prompt())


async def test_an_engine_of_another_life_has_nothing_of_the_former():
    async with engine() as d:
        async with engine() as p:
            kv = await parked(p, prompt())
        async with engine(port=kv["remote_port"]):
            status, _ = await ask(d, prompt(), kv=kv)
        assert status == 500


async def test_who_goes_away_while_it_is_fetched_frees_both():
    async with engine() as p, engine(link_gbps=0.001, time_scale=1.0) as d:
        kv = await parked(p, prompt())
        asking = asyncio.create_task(ask(d, prompt(), kv=kv))
        async with asyncio.timeout(10):
            while not d.service.engine.kv.used:  # noqa: ASYNC110  nobody says when
                await asyncio.sleep(0.005)
        asking.cancel()
        await freed(d)
        await freed(p)


def test_a_lease_does_not_end_while_it_is_fetched():
    """On a clock that jumps: who asks in time is never late because the machine is busy."""
    lease_s = 0.1

    async def fetched():
        async with (
            engine(lease_s=lease_s) as p,
            engine(link_gbps=2.0, time_scale=1.0) as d,
        ):
            expected = await text(p, prompt())
            kv = await parked(p, prompt())
            began = asyncio.get_running_loop().time()
            assert await text(d, prompt(), kv=kv) == expected
            assert asyncio.get_running_loop().time() - began > lease_s
            assert p.service.kv_connector.expired == 0

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(fetched())


async def test_without_room_the_transfer_waits_and_then_goes_on():
    """The one that decodes is full: its KV stays where it was."""
    small = EngineSettings(kv_tokens=1024, block_size=16)
    async with engine() as p, engine(engine=small) as d:
        expected = [await text(p, prompt(seed=s), max_tokens=200) for s in "abc"]
        kv = [await parked(p, prompt(seed=s)) for s in "abc"]
        found = await asyncio.gather(
            *(text(d, prompt(seed=s), max_tokens=200, kv=k) for s, k in zip("abc", kv, strict=True))
        )
        assert found == expected
        await freed(p)
