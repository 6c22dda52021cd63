"""The emulated vLLM through HTTP, behaviour by behaviour as measured on a real one.

`TestFace` takes a base URL and could be pointed at a real server; what needs its own
arguments, a fault or a signal starts its own.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys

import aiohttp
import pytest

from scheduler.sim.arguments import EngineSettings
from workers.emulator.server import Emulator
from workers.emulator.settings import EmulatorSettings

MODEL = "emulated"
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


class Client:
    """Just enough HTTP to see what a server says."""

    def __init__(self, url):
        self.url = url

    async def __aenter__(self):
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))
        return self

    async def __aexit__(self, *_):
        await self.session.close()

    async def get(self, path):
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()

    async def post(self, path, body=None, **headers):
        async with self.session.post(self.url + path, json=body, headers=headers) as response:
            return response.status, await response.text()

    async def ask(self, path="/v1/completions", headers=None, **body):
        """A whole answer."""
        status, text = await self.post(path, {"model": MODEL, **body}, **(headers or {}))
        return Reply(status, [json.loads(text)] if text.startswith("{") else [], text)

    async def stream(self, path="/v1/completions", headers=None, on_chunk=None, **body):
        body = {"model": MODEL, "stream": True, **body}
        reply = Reply(0, [], "")
        url = self.url + path
        async with self.session.post(url, json=body, headers=headers) as response:
            reply.status = response.status
            async for line in response.content:
                reply.text += line.decode()
                if line.startswith(b"data: {"):
                    reply.chunks.append(json.loads(line[6:]))
                    if on_chunk is not None:
                        on_chunk(reply)
        return reply

    async def metric(self, name, **labels):
        _, text = await self.get("/metrics")
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(f"vllm:{name}{{") and all(label in line for label in wanted)
        )

    async def until(self, name, value, **labels):
        """Wait until a metric says so; the test's own timeout ends a wait in vain."""
        while await self.metric(name, **labels) != value:  # noqa: ASYNC110  a server has no events
            await asyncio.sleep(0.005)

    async def until_load(self, value):
        """Wait until so many requests are inside the server."""
        while json.loads((await self.get("/load"))[1]) != {"server_load": value}:  # noqa: ASYNC110  as above
            await asyncio.sleep(0.005)

    async def fault(self, kind, **fields):
        status, text = await self.post("/emulator/fault", {"kind": kind, **fields})
        assert status == 200, text


class Reply:
    def __init__(self, status, chunks, text):
        self.status = status
        self.chunks = chunks
        self.text = text

    @property
    def choices(self):
        return [choice for chunk in self.chunks for choice in chunk.get("choices", [])]

    @property
    def said(self):
        parts = [
            choice.get("text")
            or choice.get("delta", {}).get("content")
            or choice.get("message", {}).get("content")
            or ""
            for choice in self.choices
        ]
        return "".join(parts)

    @property
    def ids(self):
        return [token for choice in self.choices for token in choice.get("token_ids") or []]

    @property
    def finish_reason(self):
        reasons = [choice["finish_reason"] for choice in self.choices if choice["finish_reason"]]
        assert len(reasons) <= 1
        return reasons[0] if reasons else None

    @property
    def usage(self):
        return self.chunks[-1].get("usage")

    @property
    def error(self):
        return next((chunk["error"] for chunk in self.chunks if "error" in chunk), None)

    @property
    def is_done(self):
        return self.text.endswith("data: [DONE]\n\n")


@pytest.fixture
async def server():
    """A server with priorities and four slots."""
    async with serving() as client:
        yield client


USAGE = {"include_usage": True}
ENDLESS = {"max_tokens": 50_000, "ignore_eos": True}


class TestFace:
    """Requests and answers."""

    async def test_a_stream_gives_every_token_a_reason_and_usage(self, server):
        """Tokens are counted by usage, never by chunks; [DONE] comes last."""
        reply = await server.stream(
            prompt=[1, 2, 3], max_tokens=24, ignore_eos=True, stream_options=USAGE
        )

        assert (reply.status, reply.finish_reason, reply.is_done) == (200, "length", True)
        assert (reply.usage["prompt_tokens"], reply.usage["completion_tokens"]) == (3, 24)
        assert reply.chunks[-1]["choices"] == []
        assert len(reply.said.encode()) == 4 * 24

    async def test_a_whole_answer_says_what_its_stream_says(self, server):
        """On both faces."""
        for path, body in (
            ("/v1/completions", {"prompt": "once upon a time", "max_tokens": 9}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            whole = await server.ask(path, **body)
            stream = await server.stream(path, stream_options=USAGE, **body)

            assert whole.said == stream.said != ""
            assert whole.finish_reason == stream.finish_reason
            counts = ("prompt_tokens", "completion_tokens", "total_tokens")
            assert [whole.usage[n] for n in counts] == [stream.usage[n] for n in counts]

    async def test_chat_begins_with_a_role(self, server):
        """And only its first chunk carries it."""
        reply = await server.stream(
            "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )

        roles = [choice["delta"].get("role") for choice in reply.choices]
        assert roles[0] == "assistant"
        assert not any(roles[1:])

    async def test_content_may_come_in_text_parts(self, server):
        """They are joined; anything but text is refused."""
        parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
        path = "/v1/chat/completions"

        joined = await server.ask(path, messages=[{"role": "user", "content": parts}], max_tokens=5)
        plain = await server.ask(
            path, messages=[{"role": "user", "content": "hello"}], max_tokens=5
        )
        image = await server.ask(path, messages=[{"role": "user", "content": [{"type": "image"}]}])

        assert joined.said == plain.said
        assert image.status == 400

    async def test_running_usage_counts_up(self, server):
        """`continuous_usage_stats` puts the counts so far in every chunk."""
        reply = await server.stream(
            prompt=[1],
            max_tokens=5,
            ignore_eos=True,
            stream_options={**USAGE, "continuous_usage_stats": True},
        )

        counts = [chunk["usage"]["completion_tokens"] for chunk in reply.chunks]
        assert counts == sorted(counts)
        assert (counts[0] > 0, counts[-1]) == (True, 5)

    async def test_the_hidden_length_ends_the_text(self, server):
        """`stop` when it is reached, `length` when `max_tokens` comes first."""
        hidden = {"vllm_xargs": {"output_tokens": 7}, "prompt": [5]}

        stopped = await server.ask(max_tokens=100, **hidden)
        cut = await server.ask(max_tokens=6, **hidden)

        assert (stopped.finish_reason, stopped.usage["completion_tokens"]) == ("stop", 7)
        assert (cut.finish_reason, cut.usage["completion_tokens"]) == ("length", 6)

    async def test_min_tokens_puts_off_the_end(self, server):
        """Never fewer than that."""
        reply = await server.ask(
            prompt=[5], min_tokens=30, max_tokens=40, vllm_xargs={"output_tokens": 2}
        )

        assert (reply.finish_reason, reply.usage["completion_tokens"]) == ("stop", 30)

    async def test_a_continued_request_says_exactly_the_rest(self, server):
        """As ids, as text, and as an open assistant message."""
        whole = await server.stream(
            prompt="tell me", max_tokens=30, ignore_eos=True, return_token_ids=True
        )
        prompt_ids = whole.choices[0]["prompt_token_ids"]
        by_ids = await server.ask(
            prompt=prompt_ids + whole.ids[:11], max_tokens=19, ignore_eos=True
        )
        by_text = await server.ask(
            prompt="tell me" + whole.said[:44], max_tokens=19, ignore_eos=True
        )
        assert by_ids.said == by_text.said == whole.said[44:]

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

    async def test_an_answer_left_open_takes_no_second_opening(self, server):
        """vLLM refuses both flags at once, and one of them is on by default."""
        reply = await server.ask(
            "/v1/chat/completions",
            messages=[{"role": "assistant", "content": "so"}],
            continue_final_message=True,
        )

        assert (reply.status, reply.error["code"]) == (400, 400)

    async def test_the_id_carries_the_clients_own(self, server):
        """`X-Request-Id`, behind the face's prefix."""
        headers = {"X-Request-Id": "abc-123"}

        completion = await server.ask(prompt=[1], headers=headers)
        chat = await server.ask(
            "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], headers=headers
        )

        assert completion.chunks[0]["id"] == "cmpl-abc-123"
        assert chat.chunks[0]["id"] == "chatcmpl-abc-123"

    @pytest.mark.parametrize(
        ("body", "status"),
        [
            pytest.param({"model": "nope", "prompt": "x"}, 404, id="unknown model"),
            pytest.param({"prompt": [1] * 60_000, "max_tokens": 4}, 400, id="too long"),
            pytest.param({"prompt": [1], "max_tokens": 60_000}, 400, id="too long an answer"),
            pytest.param({"prompt": "x", "priority": "abc"}, 400, id="bad priority"),
            pytest.param({"prompt": "x", "n": 2}, 400, id="two answers"),
            pytest.param({"prompt": ["a", "b"]}, 400, id="two prompts"),
            pytest.param({"prompt": [[1], [2]]}, 400, id="two prompts of ids"),
            pytest.param({"prompt": ""}, 400, id="no prompt"),
            pytest.param({"prompt": [-1]}, 400, id="no such token"),
            pytest.param({"prompt": "x", "max_tokens": 0}, 400, id="no room"),
            pytest.param({"prompt": "x", "stream_options": USAGE}, 400, id="not a stream"),
        ],
    )
    async def test_a_bad_request_is_refused_with_its_reason(self, server, body, status):
        """The status stands in the error too, with a message."""
        reply = await server.ask(**body)

        assert (reply.status, reply.error["code"]) == (status, status)
        assert reply.error["message"]

    async def test_what_stands_around_it(self, server):
        """Models, health, version, load."""
        models = json.loads((await server.get("/v1/models"))[1])
        assert models["data"][0]["id"] == MODEL
        assert models["data"][0]["max_model_len"] == 60_000
        assert await server.get("/health") == (200, "")
        assert json.loads((await server.get("/version"))[1]) == {"version": "0.32.0"}
        assert json.loads((await server.get("/load"))[1]) == {"server_load": 0}


class TestEngine:
    """What the engine behind the face does."""

    async def test_a_repeated_prompt_is_cached_up_to_its_last_block(self):
        """992 of 1,000 tokens with blocks of 32; other content after a shared start: 512."""
        async with serving(engine=EngineSettings(block_size=32)) as server:
            prompt = list(range(10, 1010))
            other = prompt[:512] + [7] * 488

            cached = [
                (await server.ask(prompt=ids, max_tokens=1)).usage["prompt_tokens_details"]
                for ids in (prompt, prompt, other)
            ]

            assert [detail["cached_tokens"] for detail in cached] == [0, 992, 512]
            assert await server.metric("prefix_cache_queries_total") == 3000
            assert await server.metric("prefix_cache_hits_total") == 1504
            local = await server.metric("prompt_tokens_by_source_total", source="local_cache_hit")
            assert local == 1504

            assert (await server.post("/reset_prefix_cache"))[0] == 200
            again = await server.ask(prompt=prompt, max_tokens=1)
            assert again.usage["prompt_tokens_details"]["cached_tokens"] == 0

    async def test_a_salt_keeps_tenants_apart(self, server):
        """Equal prompts under different `cache_salt` share nothing."""
        for salt in ("a", "b"):
            reply = await server.ask(prompt=[9] * 640, max_tokens=1, cache_salt=salt)
            assert reply.usage["prompt_tokens_details"]["cached_tokens"] == 0

    async def test_priority_orders_those_that_wait(self):
        """The only slot is busy; then the header's and the body's lowest number go first."""
        order = []
        slot = EngineSettings(scheduling_policy="priority", max_num_seqs=1)
        async with serving(engine=slot) as server:
            busy = asyncio.create_task(server.stream(prompt=[1], priority=-100, **ENDLESS))
            await server.until("num_requests_running", 1)

            async def one(name, body, header=None):
                headers = {"X-Vllm-Priority": header} if header else None
                await server.stream(
                    prompt=[2],
                    max_tokens=50,
                    ignore_eos=True,
                    priority=body,
                    headers=headers,
                    on_chunk=lambda reply: order.append(name) if len(reply.chunks) == 1 else None,
                )

            wanted = [("low", 10), ("mid", 5), ("high", 90, "0"), ("low again", 10)]
            waiting = []
            for number, arguments in enumerate(wanted, 1):
                waiting.append(asyncio.create_task(one(*arguments)))
                await server.until("num_requests_waiting", number)
            busy.cancel()
            await asyncio.gather(*waiting)

            assert order == ["high", "mid", "low", "low again"]
            assert await server.metric("num_preemptions_total") == 0

    async def test_a_full_line_is_503_or_a_200_with_an_error_inside(self):
        """Non-streams get the status, streams get it as a chunk."""
        limits = EngineSettings(max_num_seqs=1, max_num_batched_tokens=64, max_num_queued_reqs=1)
        async with serving(engine=limits) as server:
            held = []
            for running, waiting in ((1, 0), (1, 1)):
                held.append(asyncio.create_task(server.stream(prompt=[1], **ENDLESS)))
                await server.until("num_requests_waiting", waiting)
                await server.until("num_requests_running", running)

            whole = await server.ask(prompt=[1], max_tokens=2)
            stream = await server.stream(prompt=[1], max_tokens=2)

            assert (whole.status, whole.error["code"]) == (503, 503)
            assert (stream.status, stream.error["code"], stream.said) == (200, 503, "")
            assert await server.metric("admission_rejections_total") == 2
            for task in held:
                task.cancel()

    async def test_a_client_that_leaves_frees_its_slot(self, server):
        """Stream or not: nothing runs on, and the abort is counted."""
        for is_stream in (True, False):
            task = asyncio.create_task(server.ask(prompt=[1], stream=is_stream, **ENDLESS))
            await server.until("num_requests_running", 1)
            task.cancel()
            await server.until("num_requests_running", 0)

        assert await server.metric("kv_cache_usage_perc") == 0
        assert await server.metric("request_success_total", finished_reason="abort") == 2

    @pytest.mark.parametrize(
        ("path", "body", "request_id", "is_known"),
        [
            ("/v1/completions", {"prompt": [1]}, "cmpl-me-0", True),
            ("/v1/completions", {"prompt": [1]}, "cmpl-me", False),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "x"}]},
                "chatcmpl-me",
                True,
            ),
        ],
    )
    async def test_abort_wants_the_engines_own_id(self, server, path, body, request_id, is_known):
        """Completions need the -0; any other id is 200 and does nothing."""
        headers = {"X-Request-Id": "me"}
        task = asyncio.create_task(server.stream(path, headers=headers, **body, **ENDLESS))
        await server.until("num_requests_running", 1)

        status, _ = await server.post("/inference/v1/abort_requests", {"request_ids": [request_id]})

        assert status == 200
        assert await server.metric("num_requests_running") == (0 if is_known else 1)
        if is_known:
            reply = await task
            assert (reply.finish_reason, reply.is_done) == ("abort", True)
        task.cancel()

    async def test_load_counts_what_is_in_the_server(self, server):
        """Running and waiting together."""
        tasks = [asyncio.create_task(server.stream(prompt=[1], **ENDLESS)) for _ in range(7)]
        await server.until("num_requests_waiting", 3)

        assert json.loads((await server.get("/load"))[1]) == {"server_load": 7}
        assert await server.metric("num_requests_running") == 4
        assert await server.metric("num_requests_waiting_by_reason", reason="capacity") == 3
        for task in tasks:
            task.cancel()

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


class TestPauses:
    async def test_a_waiting_pause_returns_when_the_running_are_done(self, server):
        """And holds new work until it is resumed: a drain that does not end."""
        await server.post("/pause?mode=keep")
        running = asyncio.create_task(
            server.stream(prompt=[1], max_tokens=500, ignore_eos=True, stream_options=USAGE)
        )
        await server.until("num_requests_waiting", 1)
        await server.post("/resume")
        await server.until("num_requests_waiting", 0)

        await server.post("/pause?mode=wait")

        assert await server.metric("num_requests_running") == 0
        assert (await running).usage["completion_tokens"] == 500
        held = asyncio.create_task(server.stream(prompt=[1], max_tokens=2))
        await server.until("num_requests_waiting", 1)
        assert json.loads((await server.get("/is_paused"))[1]) == {"is_paused": True}
        assert (await server.get("/health"))[0] == 200
        await server.post("/resume")
        assert (await held).finish_reason == "length"

    async def test_a_keeping_pause_freezes_the_running(self, server):
        """They go on where they were."""
        running = asyncio.create_task(server.stream(prompt=[1], **ENDLESS))
        await server.until("num_requests_running", 1)

        await server.post("/pause?mode=keep")
        await server.metric("generation_tokens_total")  # the step under way may still end
        before = await server.metric("generation_tokens_total")
        for _ in range(20):
            assert await server.metric("generation_tokens_total") == before
        assert await server.metric("num_requests_running") == 1
        await server.post("/resume")

        while await server.metric("generation_tokens_total") == before:
            assert not running.done()
        running.cancel()

    async def test_an_aborting_pause_ends_the_running(self, server):
        """With finish reason abort."""
        running = asyncio.create_task(server.stream(prompt=[1], **ENDLESS))
        await server.until("num_requests_running", 1)

        await server.post("/pause?mode=abort")

        assert (await running).finish_reason == "abort"

    async def test_asleep_it_looks_healthy_and_hangs(self, server):
        """Only the sleep state tells; `/wake_up` lets the request through."""
        assert (await server.post("/sleep?level=1"))[0] == 200
        held = asyncio.create_task(server.stream(prompt=[1], max_tokens=2))
        await server.until("num_requests_waiting", 1)

        assert (await server.get("/health"))[0] == 200
        assert await server.metric("engine_sleep_state", sleep_state="awake") == 0
        assert json.loads((await server.get("/is_sleeping"))[1]) == {"is_sleeping": True}
        await server.post("/wake_up")
        assert (await held).finish_reason == "length"


class TestEnds:
    async def test_sigterm_aborts_the_running_with_a_200(self):
        """Finish reason abort, [DONE], and then the port is closed."""
        async with serving() as server:
            running = asyncio.create_task(server.stream(prompt=[1], **ENDLESS))
            await server.until("num_requests_running", 1)

            server.emulator.terminate()
            reply = await running
            await server.emulator.gone.wait()

            assert (reply.status, reply.finish_reason, reply.is_done) == (200, "abort", True)
            with pytest.raises(aiohttp.ClientConnectorError):
                await server.get("/health")

    async def test_a_drain_finishes_the_running_and_says_nothing_to_the_new(self):
        """New requests: 200, no token, no choice; `/health` stays 200 meanwhile."""
        async with serving(shutdown_timeout_s=20) as server:
            await server.fault("freeze")  # so that it outlasts what follows
            held = asyncio.create_task(
                server.stream(prompt=[1], max_tokens=1500, ignore_eos=True, stream_options=USAGE)
            )
            await server.until("num_requests_waiting", 1)

            server.emulator.terminate()
            await asyncio.sleep(0)
            stream = await server.stream(prompt=[1], max_tokens=4, stream_options=USAGE)
            whole = await server.ask(prompt=[1], max_tokens=4)

            assert (stream.status, stream.choices, stream.is_done) == (200, [], True)
            assert stream.usage["completion_tokens"] == 0
            assert (whole.status, whole.finish_reason) == (200, "abort")
            assert whole.usage["completion_tokens"] == 0
            assert (await server.get("/health"))[0] == 200
            await server.fault("thaw")
            assert (await held).usage["completion_tokens"] == 1500
            await server.emulator.gone.wait()

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
