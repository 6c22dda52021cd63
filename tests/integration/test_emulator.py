"""The emulated vLLM through HTTP: what no real one does. What both do is in tests/engine."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys

import aiohttp
import pytest
from face import ENDLESS, MODEL, USAGE, Client

from scheduler.sim.arguments import EngineSettings
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings

FAST = 100.0
"Engine seconds a wall second: a decode step of 12 ms takes 0.12."


def settings(**changes):
    changes.setdefault("engine", EngineSettings(scheduling_policy="priority", max_num_seqs=4))
    changes.setdefault("time_scale", FAST)
    changes.setdefault("max_model_len", 60_000)
    return EmulatorSettings(model=MODEL, allow_faults=True, **changes)


@contextlib.asynccontextmanager
async def serving(**changes):
    async with Emulator(settings(**changes)) as emulator, Client(emulator.url) as client:
        client.emulator = emulator
        yield client


@pytest.fixture
async def server():
    """A server with priorities and four slots."""
    async with serving() as client:
        yield client


class TestFace:
    async def test_a_token_is_four_bytes_of_text(self, server):
        """So texts and ids turn into each other, and lengths are known beforehand."""
        reply = await server.stream(prompt=[1, 2, 3], max_tokens=24, ignore_eos=True)

        assert len(reply.said.encode()) == 4 * 24

    async def test_an_unlimited_message_ends_by_itself(self, server):
        """And continued in the middle it ends where the whole would have."""
        path, user = "/v1/chat/completions", {"role": "user", "content": "tell me"}

        chat = await server.ask(path, messages=[user])
        going_on = await server.ask(
            path,
            messages=[user, {"role": "assistant", "content": chat.said[:20]}],
            continue_final_message=True,
            add_generation_prompt=False,
        )

        assert going_on.said == chat.said[20:]
        assert going_on.finish_reason == chat.finish_reason == "stop"

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param({"prompt": "x", "n": 2}, id="two answers"),
            pytest.param({"prompt": ["a", "b"]}, id="two prompts"),
            pytest.param({"prompt": [[1], [2]]}, id="two prompts of ids"),
        ],
    )
    async def test_what_is_not_emulated_is_refused(self, server, body):
        """vLLM would answer these."""
        reply = await server.ask(**body)

        assert (reply.status, reply.error["code"]) == (400, 400)
        assert "emulated" in reply.error["message"]


class TestRace:
    async def test_who_comes_in_together_may_be_refused_inside_a_200(self):
        """Both found room before their streams began, and only one has it when it is to be taken."""
        limits = EngineSettings(max_num_queued_reqs=1)
        async with serving(engine=limits, time_scale=1) as server:
            replies = await asyncio.gather(
                *(server.stream(prompt=[1], max_tokens=2, ignore_eos=True) for _ in range(2))
            )

            assert [reply.status for reply in replies] == [200, 200]
            (refused,) = [reply for reply in replies if reply.error]
            assert (refused.error["code"], refused.said, refused.is_done) == (503, "", True)


class TestTime:
    async def test_a_late_process_hands_out_several_tokens_at_once(self):
        """At a scale no process can follow, chunks are fewer than tokens and no step is longer."""
        async with serving(enable_per_request_metrics=True, time_scale=10_000) as server:
            reply = await server.stream(
                prompt=[1], max_tokens=2000, ignore_eos=True, stream_options=USAGE
            )

            assert len(reply.said.encode()) == 4 * 2000
            assert len(reply.choices) < 2000
            assert 12 < reply.chunks[-1]["metrics"]["mean_itl_ms"] < 13

    async def test_times_are_measured_in_engine_seconds(self):
        """Histograms and per-request metrics agree with the profile, whatever the wall clock does."""
        async with serving(enable_per_request_metrics=True, frontend=False) as server:
            reply = await server.stream(
                prompt=[1] * 64, max_tokens=101, ignore_eos=True, stream_options=USAGE
            )

            times = reply.chunks[-1]["metrics"]
            assert 12 < times["mean_itl_ms"] < 13
            assert times["generation_time_ms"] == pytest.approx(100 * times["mean_itl_ms"])
            assert await server.metric("inter_token_latency_seconds_count") == 100
            total = await server.metric("inter_token_latency_seconds_sum")
            assert total == pytest.approx(times["generation_time_ms"] / 1e3)
            for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
                assert await server.metric(f"{name}_seconds_count") == 1
            assert await server.metric("cache_config_info", block_size=16) == 1


class TestEnds:
    async def test_a_claim_on_a_peers_blocks_kills_the_engine(self):
        """One request with bare `do_remote_prefill` takes everybody's answers with it."""
        async with serving() as server:
            running = asyncio.create_task(server.stream(prompt=[1], **ENDLESS))
            whole = asyncio.create_task(server.ask(prompt=[1], **ENDLESS))
            await server.until("num_requests_running", 2)

            killer = await server.stream(
                prompt=[1], max_tokens=1, kv_transfer_params={"do_remote_prefill": True}
            )
            health, _ = await server.get("/health")
            stream = await running

            assert (killer.status, killer.error["code"], killer.is_done) == (200, 500, True)
            assert (stream.status, stream.error["code"], stream.is_done) == (200, 500, True)
            assert (await whole).status == 500
            assert health == 503
            await server.emulator.gone.wait()
            assert server.emulator.exit_code == 1


class TestFaults:
    async def test_statuses_hit_the_next_requests_in_order(self, server):
        """And only as many as were asked for."""
        await server.fault("status", status=429, count=2)
        await server.fault("status", status=503)

        statuses = [(await server.ask(prompt=[1], max_tokens=1)).status for _ in range(4)]

        assert statuses == [429, 429, 503, 200]

    @pytest.mark.parametrize("is_stream", [True, False])
    async def test_a_broken_connection(self, server, is_stream):
        """After a number of tokens, without an end."""
        await server.fault("cut", after_tokens=3)

        with pytest.raises(aiohttp.ClientError):
            await server.ask(prompt=[1], max_tokens=9, ignore_eos=True, stream=is_stream)

        await server.until("num_requests_running", 0)

    async def test_an_error_inside_a_200(self, server):
        """The tokens before it have reached the client."""
        await server.fault("error_chunk", after_tokens=3)

        reply = await server.stream(prompt=[1], max_tokens=9, ignore_eos=True)

        assert (reply.status, reply.error["code"], reply.is_done) == (200, 500, True)
        assert (len(reply.said), reply.finish_reason) == (12, None)

    async def test_an_abort_nobody_asked_for(self, server):
        """Finish reason abort after the tokens named."""
        await server.fault("abort", after_tokens=3)

        reply = await server.stream(prompt=[1], max_tokens=9, ignore_eos=True, stream_options=USAGE)

        assert (reply.finish_reason, reply.usage["completion_tokens"]) == ("abort", 3)

    async def test_no_tokens_at_all(self, server):
        """200, as a draining server says it."""
        await server.fault("no_tokens")

        reply = await server.stream(prompt=[1], max_tokens=9, stream_options=USAGE)

        assert (reply.status, reply.choices, reply.usage["completion_tokens"]) == (200, [], 0)

    async def test_an_end_without_its_end(self, server):
        """Every token came; the reason and [DONE] did not."""
        await server.fault("no_done")

        reply = await server.stream(prompt=[1], max_tokens=9, ignore_eos=True)

        assert (len(reply.said), reply.finish_reason, reply.is_done) == (36, None, False)

    async def test_garbage(self, server):
        """A 200 that is not JSON."""
        await server.fault("garbage")

        reply = await server.ask(prompt=[1], max_tokens=1)

        assert (reply.status, reply.chunks) == (200, [])

    @pytest.mark.parametrize(
        ("kind", "n_chunks"), [("hang", 2), ("silence", 0)], ids=["in the stream", "from the start"]
    )
    async def test_a_request_that_hangs(self, server, kind, n_chunks):
        """It stays open until its client leaves; other requests are served meanwhile."""
        await server.fault(kind, after_tokens=n_chunks)
        seen = asyncio.Queue()
        task = asyncio.create_task(
            server.stream(
                prompt=[1], max_tokens=9, ignore_eos=True, on_chunk=lambda _: seen.put_nowait(1)
            )
        )
        await server.until_load(1)
        if n_chunks:
            await seen.get()

        other = await server.ask(prompt=[1], max_tokens=9, ignore_eos=True)

        assert other.finish_reason == "length"
        assert not task.done()
        task.cancel()
        await server.until("num_requests_running", 0)

    async def test_a_frozen_engine_answers_health_and_nothing_else(self, server):
        """Until it thaws."""
        await server.fault("freeze")
        held = asyncio.create_task(server.ask(prompt=[1], max_tokens=2))
        await server.until("num_requests_waiting", 1)

        assert (await server.get("/health"))[0] == 200
        await server.fault("thaw")
        assert (await held).status == 200

    async def test_a_slow_engine_takes_that_much_longer(self):
        """Measured by its own clock."""
        async with serving(enable_per_request_metrics=True) as server:
            await server.fault("slow", factor=3)

            reply = await server.ask(prompt=[1], max_tokens=20, ignore_eos=True)

            assert 36 < reply.chunks[0]["metrics"]["mean_itl_ms"] < 39

    async def test_death_is_a_broken_connection_and_a_closed_port(self):
        """Nobody gets a farewell."""
        async with serving() as server:
            running = asyncio.create_task(server.stream(prompt=[1], **ENDLESS))
            await server.until("num_requests_running", 1)

            with contextlib.suppress(aiohttp.ClientError):
                await server.fault("die")
            await server.emulator.gone.wait()

            with pytest.raises(aiohttp.ClientError):
                await running
            with pytest.raises(aiohttp.ClientConnectorError):
                await server.get("/health")

    async def test_an_unknown_fault_is_refused(self, server):
        """With what was found."""
        status, text = await server.post("/emulator/fault", {"kind": "gremlin"})

        assert (status, "gremlin" in text) == (400, True)

    async def test_a_sleep_of_no_depth_is_refused(self, server):
        """As a pause of no mode; nobody falls asleep of it."""
        status, text = await server.post("/sleep?level=x", {})

        assert (status, "level is 'x'" in text) == (400, True)
        assert '"is_sleeping":false' in (await server.get("/is_sleeping"))[1]

    async def test_faults_must_be_allowed(self):
        """Otherwise the route does not exist."""
        async with Emulator(EmulatorSettings()) as emulator, Client(emulator.url) as client:
            assert (await client.post("/emulator/fault", {"kind": "die"}))[0] == 404


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "workers.emulator", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestCommand:
    async def test_it_says_where_it_serves_and_ends_on_sigterm(self, tmp_path):
        """One JSON line on stdout, the same in the ready file; exit code 0."""
        ready = tmp_path / "ready.json"
        with command("--profile", "h100", "--model", "m", "--ready-file", str(ready)) as process:
            line = await asyncio.to_thread(process.stdout.readline)
            found = json.loads(line)
            async with Client(found["url"]) as client:
                assert (await client.get("/health"))[0] == 200
            assert (found["model"], found["profile"]) == ("m", "h100")
            assert ready.read_text() == line

            taken = await asyncio.to_thread(
                subprocess.run,
                [*process.args, "--port", found["url"].rsplit(":", 1)[1]],
                capture_output=True,
                text=True,
                check=False,
            )
            process.send_signal(signal.SIGTERM)
            _, talk = await asyncio.to_thread(process.communicate)

        assert (process.returncode, talk) == (0, "")
        assert taken.returncode == 2
        assert len(taken.stderr.splitlines()) == 1
        assert "cannot be bound" in taken.stderr

    async def test_a_fault_can_kill_the_process(self):
        """At once, with exit code 1."""
        with command("--allow-faults") as process:
            url = json.loads(await asyncio.to_thread(process.stdout.readline))["url"]
            async with Client(url) as client:
                with contextlib.suppress(aiohttp.ClientError):
                    await client.fault("die")
            await asyncio.to_thread(process.communicate)

        assert process.returncode == 1
