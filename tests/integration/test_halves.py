"""Half a request in a worker's hands: two workers, two emulated engines with a KV connector; the test plays the dispatcher."""

import asyncio
import contextlib

import aiohttp
import msgspec
import pytest
from hand import until

from scheduler.settings import (
    EngineAddress,
    LeaseSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
)
from scheduler.wire.words import KV_PARAMS_BYTES
from workers.emulator.faults import Cut
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings, KvExtra, KvTransfer
from workers.worker import Worker

TEXT = "/v1/completions"
N_TOKENS = 30


def asked(seed="a", **more):
    text = " ".join(f"{seed}{n:03}" for n in range(300))
    return {
        "model": "emulated",
        "prompt": text,
        "max_tokens": N_TOKENS,
        "ignore_eos": True,
        **more,
    }


def emulated(*, lease_s=30.0, policy="fail", link_gbps=400.0, time_scale=20.0, kv=True):
    transfer = KvTransfer(
        kv_load_failure_policy=policy,
        kv_connector_extra_config=KvExtra(kv_lease_duration=lease_s),
        link_gbps=link_gbps,
    )
    return Emulator(
        EmulatorSettings(
            time_scale=time_scale, kv_transfer=transfer if kv else None, allow_faults=True
        )
    )


@contextlib.asynccontextmanager
async def working(redis_url, pool, **engines):
    """A worker beside these engines, by their names' first letter for prefill or for decode."""
    roles = {"p": "prefill", "d": "decode"}
    addresses = tuple(
        EngineAddress(name=name, url=engine.url, roles=(roles[name[0]],), link_gbps=400.0)
        for name, engine in engines.items()
    )
    worker = Worker(
        Settings(
            pool=pool,
            redis=RedisSettings(url=redis_url),
            lease=LeaseSettings(worker_s=1.0, beat_s=0.3),
            worker=WorkerSettings(engines=addresses, probe_s=0.1, drain_s=0.0),
        )
    )
    started = asyncio.Event()
    task = asyncio.create_task(worker.run(started.set))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield worker
    finally:
        waiting.cancel()
        worker.stop()
        worker.stop()
        async with asyncio.timeout(10):
            await task


@pytest.fixture
async def engines():
    async with emulated() as p, emulated() as d:
        yield p, d


@pytest.fixture
async def worker(redis_url, pool, engines):
    p, d = engines
    async with working(redis_url, pool, p0=p, d0=d) as running:
        yield running


async def first_leg(hand, request_id="r1", body=None, **fields):
    """Handed over."""
    beat = await hand.ready("p0")
    fields = {"path": TEXT, "job_endpoint": "p0", "job_leg": "prefill"} | fields
    await hand.submit(request_id, body or asked(), beat.epoch, **fields)


async def prefilled(hand, request_id="r1", body=None, **fields):
    """The first leg, done: its reward."""
    await first_leg(hand, request_id, body, **fields)
    return await hand.reward(request_id)


async def decode(hand, reward, *, attempt=2, **fields):
    """The second, handed over."""
    beat = await hand.ready("d0")
    fields = {"kv_params": reward.kv_params, "kv_until_at": hand.redis.now() + 20.0} | fields
    return await hand.assign(
        reward.id, beat.epoch, attempt=attempt, endpoint="d0", leg="decode", **fields
    )


async def whole(hand, body=None):
    """What one engine alone says."""
    beat = await hand.ready("d0")
    await hand.submit("whole", body or asked(), beat.epoch, path=TEXT, job_endpoint="d0")
    return said(await hand.result("whole"))


def said(result):
    assert result.outcome == "completed", result.reason
    return msgspec.json.decode(result.body)["choices"][0]["text"]


async def freed(engine):
    await until(lambda: not engine.service.engine.kv.used)


class TestBoth:
    async def test_what_is_said_of_an_endpoint(self, hand, worker):
        """Its role and its link: the dispatcher sends it half requests by them."""
        beat = await hand.ready("p0")
        assert (beat.roles, beat.link_gbps) == (("prefill",), 400.0)

    async def test_they_say_what_a_whole_says(self, hand, worker, engines):
        """The prompt is computed once, where it should be, and nothing stays behind."""
        reward = await prefilled(hand)
        assert (reward.outcome, reward.leg, reward.attempt) == ("prefilled", "prefill", 1)
        assert await hand.results("r1") == []
        assert engines[0].service.engine.kv.used > 0
        await decode(hand, reward)
        result = await hand.result("r1")
        assert (result.endpoint, result.attempt) == ("d0", 2)
        assert result.output_tokens == N_TOKENS
        assert said(result) == await whole(hand)
        await freed(engines[0])

    async def test_a_second_leg_is_no_retry(self, hand, worker):
        """It is the second attempt by number; who watches for retries wants those that repeat work."""
        reward = await prefilled(hand)
        await decode(hand, reward)
        await hand.result("r1")
        await prefilled(hand, "r2", job_attempt=3)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{worker.metrics_port}/metrics") as response,
        ):
            shown = (await response.text()).splitlines()
        retries = [line for line in shown if line.startswith("headgate_worker_retries_total")]
        assert retries == ['headgate_worker_retries_total{endpoint="p0"} 1.0']

    async def test_what_was_cached_is_what_the_first_leg_spared(self, hand, worker):
        """To the engine that decodes all or nothing of what it fetched may be cached: the client's usage is the other's."""
        await prefilled(hand, "before")
        reward = await prefilled(hand)
        assert reward.cached_tokens > 0
        await decode(hand, reward, kv_cached_tokens=reward.cached_tokens)
        result = await hand.result("r1")
        usage = msgspec.json.decode(result.body)["usage"]
        assert result.cached_tokens == reward.cached_tokens
        assert usage["prompt_tokens_details"] == {"cached_tokens": reward.cached_tokens}

    async def test_a_stream_is_the_second_leg_s_alone(self, hand, worker):
        """The first token that the client sees is of the engine that decodes; the first leg's is nobody's."""
        reward = await prefilled(hand, stream=True)
        assert await hand.tokens("r1") == []
        await decode(hand, reward)
        result = await hand.result("r1")
        assert await hand.text("r1") == said(result) == await whole(hand)
        tokens = await hand.tokens("r1")
        assert {part.attempt for part in tokens if part.text} == {2}
        assert result.first_token_at > reward.first_token_at

    async def test_what_a_chat_was_begun_with_goes_on_in_two_legs(self, hand, worker, engines):
        """An attempt broke off in the middle: both legs go on from what was written."""
        body = {
            "model": "emulated",
            "messages": [{"role": "user", "content": "tell me a story of " + "rivers " * 200}],
            "max_tokens": N_TOKENS,
            "ignore_eos": True,
        }
        expected = await whole_chat(hand, body)
        beat = await hand.ready("d0")
        engines[1].service.faults.put(Cut(after_tokens=7))
        await hand.submit("r1", body, beat.epoch, stream=True, job_endpoint="d0")
        assert (await hand.reward("r1")).outcome == "returned"
        beat = await hand.ready("p0")
        await hand.assign("r1", beat.epoch, attempt=2, endpoint="p0", leg="prefill")
        reward = await hand.reward("r1", 2)
        assert reward.outcome == "prefilled"
        await decode(hand, reward, attempt=3)
        result = await hand.result("r1")
        assert await hand.text("r1") == chat_said(result) == expected


async def whole_chat(hand, body):
    beat = await hand.ready("d0")
    await hand.submit("whole", body, beat.epoch, job_endpoint="d0")
    return chat_said(await hand.result("whole"))


def chat_said(result):
    assert result.outcome == "completed", result.reason
    return msgspec.json.decode(result.body)["choices"][0]["message"]["content"]


class TestFirstLeg:
    async def test_an_engine_that_keeps_nothing_is_told_from_one_that_does(
        self, redis_url, pool, hand
    ):
        """Without a connector there is nothing to hand over: the leg goes back, and says why."""
        async with emulated(kv=False) as p, working(redis_url, pool, p0=p):
            reward = await prefilled(hand)
            assert reward.outcome == "returned"
            assert "--kv-transfer-config" in reward.reason

    @pytest.mark.parametrize(
        "more",
        [{"n": 2}, {"prompt": ["one", "two"]}, {"prompt_logprobs": 1}, {"use_beam_search": True}],
        ids=lambda more: next(iter(more)),
    )
    async def test_what_cannot_be_parted_is_left_to_who_decodes(self, hand, worker, engines, more):
        """No engine is asked: the second leg brings no KV, and is the whole request."""
        reward = await prefilled(hand, body=asked(**more))
        assert reward.outcome == "prefilled"
        assert await hand.redis.command("GET", hand.keys.kv("r1")) == b"{}"
        assert engines[0].service.engine.counters.steps <= 1  # the worker's own look at the engine

    async def test_a_cancelled_one_leaves_nothing_with_its_engine(self, redis_url, pool, hand):
        """Its connection closes, and the blocks are free long before any lease."""
        async with emulated(time_scale=0.02) as p, working(redis_url, pool, p0=p):
            await first_leg(hand)
            await until(lambda: p.service.engine.kv.used)
            await hand.cancel("r1", endpoint="p0")
            assert (await hand.result("r1")).outcome == "cancelled"
            await freed(p)

    async def test_its_deadline_ends_it(self, redis_url, pool, hand):
        async with emulated(time_scale=0.02) as p, working(redis_url, pool, p0=p):
            await first_leg(hand, deadline_s=0.5)
            assert (await hand.result("r1")).outcome == "expired"
            await freed(p)

    async def test_where_the_kv_is_stays_out_of_the_log(self, hand, worker):
        """A long prompt has many blocks, and rewards are kept by the hundred thousand."""
        reward = await prefilled(hand)
        said = await hand.redis.command("GET", hand.keys.kv("r1"))
        assert msgspec.json.decode(said)["do_remote_prefill"] is True
        assert len(reward.kv_params) < 32
        assert (
            0 < await hand.redis.command("PTTL", hand.keys.kv("r1")) <= 2e3 * LeaseSettings().kv_s
        )


class TestSecondLeg:
    async def test_whose_claim_has_run_out_goes_back(self, hand, worker):
        reward = await prefilled(hand)
        await hand.redis.command("DEL", hand.keys.kv("r1"))
        await decode(hand, reward)
        returned = await hand.reward("r1", 2)
        assert (returned.outcome, returned.admitted_at) == ("returned", None)
        assert "claim check has run out" in returned.reason

    async def test_without_kv_it_computes_the_prompt_itself(self, hand, worker):
        reward = await prefilled(hand)
        await decode(hand, reward, kv_params=b"{}")
        assert said(await hand.result("r1")) == await whole(hand)

    async def test_one_that_comes_too_late_is_handed_back(self, hand, worker):
        """Whatever lies there now would be answered from, and nothing would say that it is wrong."""
        reward = await prefilled(hand)
        await decode(hand, reward, kv_until_at=hand.redis.now() - 0.001)
        late = await hand.reward("r1", 2)
        assert (late.outcome, late.leg) == ("returned", "decode")
        assert "too late" in late.reason
        assert late.admitted_at is None

    async def test_one_that_waits_too_long_for_its_admission_is_handed_back(
        self, redis_url, pool, hand, engines
    ):
        """The engine is paused: nothing enters it."""
        p, d = engines
        async with working(redis_url, pool, p0=p, d0=d) as worker:
            reward = await prefilled(hand)
            beat = await hand.ready("d0")
            [endpoint] = [one for one in worker.endpoints if one.name == "d0"]
            endpoint.health._doubts = 1  # somebody waits to hear if it lives
            await hand.assign(
                "r1",
                beat.epoch,
                attempt=2,
                endpoint="d0",
                leg="decode",
                kv_params=reward.kv_params,
                kv_until_at=hand.redis.now() + 0.3,
            )
            late = await hand.reward("r1", 2)
            assert (late.outcome, late.admitted_at) == ("returned", None)

    async def test_where_the_first_engine_is_gone_it_goes_back(self, redis_url, pool, hand):
        """And its own engine is not taken for a broken one, however often that happens."""
        async with emulated() as p, emulated() as d, working(redis_url, pool, p0=p, d0=d):
            found = [await prefilled(hand, f"r{n}") for n in range(5)]
            await p.stop()
            for reward in found:
                await decode(hand, reward)
                assert (await hand.reward(reward.id, 2)).outcome == "returned"
            states = [beat.state for beat in await hand.beats() if beat.endpoint == "d0"]
            assert "away" not in states[states.index("ready") :]

    async def test_where_its_engine_may_compute_again_it_does(self, redis_url, pool, hand):
        async with (
            emulated(policy="recompute") as d,
            emulated() as p,
            working(redis_url, pool, p0=p, d0=d),
        ):
            reward = await prefilled(hand)
            expected = await whole(hand)
            await p.stop()
            await decode(hand, reward)
            assert said(await hand.result("r1")) == expected

    @pytest.mark.parametrize(
        "kv_params",
        [b"[]", b"null", b"{", b'"x"', b"x" * (KV_PARAMS_BYTES + 1)],
        ids=["list", "null", "open", "text", "long"],
    )
    async def test_what_is_no_object_never_reaches_an_engine(self, hand, worker, kv_params):
        reward = await prefilled(hand)
        await decode(hand, reward, kv_params=kv_params)
        back = await hand.reward("r1", 2)
        assert back.outcome == "returned"
        assert "kv_transfer_params" in back.reason

    async def test_its_end_before_the_kv_has_come_frees_both(self, redis_url, pool, hand):
        """Cancelled in the middle of the transfer."""
        async with (
            emulated() as p,
            emulated(link_gbps=0.001, time_scale=1.0) as d,
            working(redis_url, pool, p0=p, d0=d),
        ):
            reward = await prefilled(hand)
            await decode(hand, reward)
            await until(lambda: d.service.engine.kv.used)
            await hand.cancel("r1", endpoint="d0")
            assert (await hand.result("r1")).outcome == "cancelled"
            await freed(p)
            await freed(d)
