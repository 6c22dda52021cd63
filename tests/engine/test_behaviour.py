"""What an engine does, fact by fact: of the emulator, and with `--engine vllm` of real servers.

A fact that only one of them shows has no place here. Metrics count since a server's start and servers are shared:
compare with what they said before.
"""

import asyncio
import contextlib
import json
from pathlib import Path

import aiohttp
import pytest
from face import ENDLESS, MODEL, USAGE, cancelled, patient

from scheduler.prefix import BLOCK_TOKENS, blocks
from workers.kv_feed import Feed, source_in
from workers.kv_mirror import Mirror

CHAT = "/v1/chat/completions"


def prompt_of(seed, n_tokens):
    """Token ids that no other test uses."""
    return [10 + (seed * 7919 + 31 * n) % 8000 for n in range(n_tokens)]


class TestAnswers:
    async def test_a_stream_gives_every_token_a_reason_and_usage(self, server):
        """Tokens are counted by usage, never by chunks; [DONE] comes last."""
        reply = await server.stream(
            prompt=[1, 2, 3], max_tokens=24, ignore_eos=True, stream_options=USAGE
        )

        assert (reply.status, reply.finish_reason, reply.is_done) == (200, "length", True)
        assert (reply.usage["prompt_tokens"], reply.usage["completion_tokens"]) == (3, 24)
        assert reply.chunks[-1]["choices"] == []
        assert reply.said

    async def test_a_whole_answer_says_what_its_stream_says(self, server):
        """On both faces."""
        user = {"role": "user", "content": "hi"}
        for path, body in (
            ("/v1/completions", {"prompt": "once upon a time", "max_tokens": 9}),
            (CHAT, {"messages": [user], "max_tokens": 30}),
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
            CHAT, messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )

        roles = [choice["delta"].get("role") for choice in reply.choices]
        assert roles[0] == "assistant"
        assert not any(roles[1:])

    async def test_content_may_come_in_text_parts(self, server):
        """One part says what the plain text says; a part that says nothing is refused."""
        parts = [{"type": "text", "text": "hello"}]

        joined = await server.ask(CHAT, messages=[{"role": "user", "content": parts}], max_tokens=5)
        plain = await server.ask(
            CHAT, messages=[{"role": "user", "content": "hello"}], max_tokens=5
        )
        image = await server.ask(CHAT, messages=[{"role": "user", "content": [{"type": "image"}]}])

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

    async def test_ids_come_where_they_are_asked_for(self, server):
        """Those of the prompt once, at the head; those of the text with each piece."""
        reply = await server.stream(prompt=[5, 6], max_tokens=7, return_token_ids=True)

        assert reply.choices[0]["prompt_token_ids"] == [5, 6]
        assert not any(choice.get("prompt_token_ids") for choice in reply.choices[1:])
        assert len(reply.ids) == 7

    async def test_the_hidden_length_ends_the_text(self, server):
        """`stop` when it is reached, `length` when `max_tokens` comes first, never below `min_tokens`."""
        hidden = {"vllm_xargs": {"output_tokens": 7}, "prompt": [5]}

        stopped = await server.ask(max_tokens=100, **hidden)
        cut = await server.ask(max_tokens=6, **hidden)
        put_off = await server.ask(max_tokens=40, min_tokens=30, **hidden)

        assert (stopped.finish_reason, stopped.usage["completion_tokens"]) == ("stop", 7)
        assert (cut.finish_reason, cut.usage["completion_tokens"]) == ("length", 6)
        assert (put_off.finish_reason, put_off.usage["completion_tokens"]) == ("stop", 30)

    async def test_a_continued_text_says_exactly_the_rest(self, server):
        """As ids, and as text."""
        whole = await server.stream(
            prompt="tell me", max_tokens=30, ignore_eos=True, return_token_ids=True
        )
        prompt_ids = whole.choices[0]["prompt_token_ids"]
        head = "".join(choice["text"] for choice in whole.choices[:11])
        said = sum(len(choice["token_ids"]) for choice in whole.choices[:11])

        by_ids = await server.ask(
            prompt=prompt_ids + whole.ids[:said], max_tokens=30 - said, ignore_eos=True
        )
        by_text = await server.ask(prompt="tell me" + head, max_tokens=30 - said, ignore_eos=True)

        assert by_ids.said == by_text.said == whole.said[len(head) :]

    async def test_a_continued_message_says_exactly_the_rest(self, server):
        """As an assistant's message left open."""
        user = {"role": "user", "content": "tell me"}
        whole = await server.stream(
            CHAT, messages=[user], max_tokens=30, ignore_eos=True, return_token_ids=True
        )
        pieces = [choice for choice in whole.choices if choice["delta"].get("content")][:11]
        head = "".join(choice["delta"]["content"] for choice in pieces)
        said = sum(len(choice["token_ids"]) for choice in pieces)

        rest = await server.ask(
            CHAT,
            messages=[user, {"role": "assistant", "content": head}],
            max_tokens=30 - said,
            ignore_eos=True,
            continue_final_message=True,
            add_generation_prompt=False,
        )

        assert rest.said == whole.said[len(head) :]

    async def test_the_id_carries_the_clients_own(self, server):
        """`X-Request-Id`, behind the face's prefix."""
        headers = {"X-Request-Id": "abc-123"}

        completion = await server.ask(prompt=[1], headers=headers)
        chat = await server.ask(
            CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=2, headers=headers
        )

        assert completion.chunks[0]["id"] == "cmpl-abc-123"
        assert chat.chunks[0]["id"] == "chatcmpl-abc-123"

    async def test_the_last_chunk_carries_the_requests_times(self, server):
        """`--enable-per-request-metrics`: TTFT without the queue, and the gaps between tokens."""
        reply = await server.stream(
            prompt=[1] * 64, max_tokens=101, ignore_eos=True, stream_options=USAGE
        )

        times = reply.chunks[-1]["metrics"]
        assert times.keys() == {
            "time_to_first_token_ms",
            "generation_time_ms",
            "queue_time_ms",
            "mean_itl_ms",
            "tokens_per_second",
        }
        assert times["generation_time_ms"] == pytest.approx(100 * times["mean_itl_ms"])

    async def test_what_stands_around_it(self, server):
        """Models, health, version, load."""
        models = json.loads((await server.get("/v1/models"))[1])
        assert models["data"][0]["id"] == MODEL
        assert models["data"][0]["max_model_len"] == 32_768
        assert await server.get("/health") == (200, "")
        assert json.loads((await server.get("/version"))[1]) == {"version": "0.32.0"}
        assert json.loads((await server.get("/load"))[1]) == {"server_load": 0}
        assert json.loads((await server.get("/is_paused"))[1]) == {"is_paused": False}


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "kind", "param", "words"),
        [
            pytest.param(
                {"model": "nope", "prompt": "x"},
                *(404, "NotFoundError", "model", "does not exist"),
                id="unknown model",
            ),
            pytest.param(
                {"prompt": [1] * 32_769, "max_tokens": 4},
                *(400, "BadRequestError", "input_tokens", "maximum context length is 32768"),
                id="too long",
            ),
            pytest.param(
                {"prompt": [1] * 32_768, "max_tokens": 4},
                *(400, "BadRequestError", "max_tokens", "max_tokens must be at least 1, got 0"),
                id="no room for an answer",
            ),
            pytest.param(
                {"prompt": [1], "max_tokens": 40_000},
                *(400, "BadRequestError", "max_tokens", "cannot be greater than max_model_len"),
                id="too long an answer",
            ),
            pytest.param(
                {"prompt": "x", "max_tokens": 0},
                *(400, "BadRequestError", "max_tokens", "must be at least 1"),
                id="no answer",
            ),
            pytest.param(
                {"prompt": "x", "min_tokens": 5, "max_tokens": 2},
                *(400, "BadRequestError", None, "min_tokens must be less"),
                id="more than all",
            ),
            pytest.param(
                {"prompt": "x", "stream_options": USAGE},
                *(400, "BadRequestError", "stream_options", "Stream options"),
                id="not a stream",
            ),
            pytest.param(
                {"prompt": ""},
                *(400, "BadRequestError", "prompt", "non-empty"),
                id="no prompt",
            ),
            pytest.param(
                {"prompt": "x", "priority": "abc"},
                *(400, "Bad Request", ..., "priority"),
                id="bad priority",
            ),
            pytest.param({"prompt": [-1]}, *(400, ..., ..., ""), id="no such token"),
        ],
    )
    async def test_a_bad_request_is_refused_with_its_reason(
        self, server, body, status, kind, param, words
    ):
        """The status stands in the error too, with type, field and message."""
        reply = await server.ask(**body)

        assert (reply.status, reply.error["code"]) == (status, status)
        assert words in reply.error["message"]
        if kind is not ...:
            assert reply.error["type"] == kind
        if param is not ...:
            assert reply.error["param"] == param

    async def test_an_answer_that_does_not_fit_is_cut_to_the_room_there_is(self, server):
        """Where prompt and limit together are too long; nobody is told."""
        reply = await server.ask(prompt=[1] * 32_760, max_tokens=1000, ignore_eos=True)

        assert (reply.status, reply.finish_reason) == (200, "length")
        assert reply.usage["completion_tokens"] == 8

    async def test_an_answer_left_open_takes_no_second_opening(self, server):
        """Both flags at once are refused, and one of them is on by default."""
        reply = await server.ask(
            CHAT, messages=[{"role": "assistant", "content": "so"}], continue_final_message=True
        )

        assert (reply.status, reply.error["code"]) == (400, 400)
        assert "not compatible" in reply.error["message"]

    async def test_a_priority_in_the_header_that_is_no_number_is_passed_over(self, server):
        """Where the same in the body is refused."""
        reply = await server.ask(prompt=[1], max_tokens=2, headers={"X-Vllm-Priority": "abc"})

        assert reply.status == 200

    async def test_a_full_engine_is_a_503(self, engine):
        """Who runs counts as much as who waits; streams are refused before they begin."""
        async with engine(max_num_seqs=1, max_num_queued_reqs=2) as server:
            before = await server.metric("admission_rejections_total")
            running = await server.begun(prompt=[1], **ENDLESS)
            waiting = asyncio.create_task(server.stream(prompt=[1], **ENDLESS))
            await server.until("num_requests_waiting", 1)

            whole = await server.ask(prompt=[1], max_tokens=2)
            stream = await server.stream(prompt=[1], max_tokens=2)

            assert (whole.status, whole.error["code"]) == (503, 503)
            assert (stream.status, json.loads(stream.text)) == (503, whole.chunks[0])
            assert whole.error["type"] == "Service Unavailable"
            assert "currently busy" in whole.error["message"]
            assert await server.metric("admission_rejections_total") == before + 2
            reasons = await server.metric(
                "admission_rejections_total", reason="max_num_queued_reqs"
            )
            assert reasons == before + 2
            await cancelled(running, waiting)


class TestCache:
    async def test_a_repeated_prompt_is_cached_up_to_its_last_block(self, server):
        """992 of 1,000 tokens with blocks of 32; other content after a shared start: 512."""
        names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
        before = [await server.metric(name) for name in names]
        prompt = prompt_of(1, 1000)
        other = prompt[:512] + [7] * 488

        cached = [
            (await server.ask(prompt=ids, max_tokens=1)).usage["prompt_tokens_details"]
            for ids in (prompt, prompt, other)
        ]

        assert [detail["cached_tokens"] for detail in cached] == [0, 992, 512]
        after = [await server.metric(name) for name in names]
        assert [a - b for a, b in zip(after, before, strict=True)] == [3000, 1504]

    async def test_what_was_said_is_cached_too(self, server):
        """The next turn of a conversation begins where this one ended."""
        prompt = prompt_of(2, 100)
        reply = await server.ask(prompt=prompt, max_tokens=160, return_token_ids=True)

        again = await server.ask(prompt=prompt + reply.ids, max_tokens=1)

        # The last token said was never computed, and neither is its block full.
        assert again.usage["prompt_tokens_details"]["cached_tokens"] == 256

    async def test_resetting_forgets_all(self, server):
        """`/reset_prefix_cache`, of a server in development mode."""
        prompt = prompt_of(3, 640)
        await server.ask(prompt=prompt, max_tokens=1)

        status, body = await server.post("/reset_prefix_cache")
        again = await server.ask(prompt=prompt, max_tokens=1)

        assert (status, json.loads(body)) == (200, {"success": True})
        assert again.usage["prompt_tokens_details"]["cached_tokens"] == 0

    async def test_a_salt_keeps_tenants_apart(self, server):
        """Equal prompts under different `cache_salt` share nothing."""
        for salt in ("a", "b"):
            reply = await server.ask(prompt=prompt_of(4, 640), max_tokens=1, cache_salt=salt)
            assert reply.usage["prompt_tokens_details"]["cached_tokens"] == 0


class TestTokenizer:
    async def test_it_counts_a_prompt_as_its_answer_does(self, server):
        """Text and chat; `/tokenize` takes what makes the prompt."""
        messages = [{"role": "user", "content": "the river rises " * 40}]
        for path, body in (
            ("/v1/completions", {"prompt": "the river rises " * 40}),
            (CHAT, {"messages": messages}),
        ):
            status, text = await server.post("/tokenize", {"model": MODEL, **body})
            answer = await server.ask(path, max_tokens=1, **body)

            found = json.loads(text)
            assert status == 200
            assert found["count"] == len(found["tokens"]) == answer.usage["prompt_tokens"]


class TestKvEvents:
    """`--kv-events-config`: what is said of the cache is what it then finds."""

    @pytest.fixture
    async def server(self, engine):
        """One that publishes and has room for four prompts of 1,000 tokens."""
        async with engine(kv_events=True, max_model_len=2048, kv_tokens=4096) as server:
            await server.post("/reset_prefix_cache")
            yield server

    @contextlib.asynccontextmanager
    async def heard(self, server):
        """What it says of its cache, in the wire's blocks, while it is listened to."""
        source = source_in((await server.get("/kv_event_sources"))[1].encode(), server.url)
        mirror = Mirror()
        feed = Feed(mirror, name="it")
        feed.turn_to(source)
        task = asyncio.create_task(feed.run())
        yield mirror
        await cancelled(task)

    async def until_held(self, mirror, prompt, n_blocks):
        """Wait until it is said that so many of a prompt's blocks are there, from the start."""
        chain = blocks(prompt)
        async with patient(lambda: f"{held(mirror, prompt)} of {len(chain)} are, not {n_blocks}"):
            while held(mirror, prompt) != n_blocks:  # noqa: ASYNC110  a server has no events
                await asyncio.sleep(0.005)

    async def test_what_a_prompt_stored_is_told(self, server):
        """Its full blocks, to who listens, and to who comes later and asks for the past."""
        prompt = prompt_of(21, 1000)
        async with self.heard(server) as mirror:
            await server.ask(prompt=prompt, max_tokens=1)
            await self.until_held(mirror, prompt, 7)

        async with self.heard(server) as mirror:
            await self.until_held(mirror, prompt, 7)

    async def test_what_was_evicted_is_told(self, server):
        """Other prompts have taken its room: what is left of it is what the next request finds."""
        prompt = prompt_of(22, 1000)
        async with self.heard(server) as mirror:
            await server.ask(prompt=prompt, max_tokens=1)
            await self.until_held(mirror, prompt, 7)
            others = [prompt_of(23 + n, 1000) for n in range(4)]
            for other in others:
                await server.ask(prompt=other, max_tokens=1)
            await self.until_held(mirror, others[-1], 7)
            left = held(mirror, prompt)

            again = await server.ask(prompt=prompt, max_tokens=1)

            found = again.usage["prompt_tokens_details"]["cached_tokens"]
            assert left < 7
            assert left == found // BLOCK_TOKENS

    async def test_a_text_is_found_by_its_tokens(self, server):
        """The blocks of a text, cut by the byte, end where its tokens do: known as stored, and as evicted."""
        text = "".join(f"chapter {n}, in which the river rises; " for n in range(100))
        body = {"messages": [{"role": "user", "content": text}]}
        names = blocks(text)
        async with self.heard(server) as mirror:
            answer = await server.ask(CHAT, max_tokens=1, **body)
            said = json.loads((await server.post("/tokenize", {"model": MODEL, **body}))[1])
            await self.until_held(mirror, said["tokens"], answer.usage["prompt_tokens"] // 128)

            mirror.bind(names, said["tokens"], prompt_tokens=len(text.encode()) // 4)
            assert mirror.knows(names)
            assert mirror.teller.blocks.issuperset(names[:-1])

            for n in range(8):
                await server.ask(prompt=prompt_of(40 + n, 1000), max_tokens=1)
            await self.until_held(mirror, said["tokens"], 0)
            assert mirror.teller.blocks.isdisjoint(names)

    async def test_a_reset_is_told(self, server):
        """With the next step: nothing is there any more."""
        prompt = prompt_of(30, 1000)
        async with self.heard(server) as mirror:
            await server.ask(prompt=prompt, max_tokens=1)
            await self.until_held(mirror, prompt, 7)

            await server.post("/reset_prefix_cache")
            await server.ask(prompt=[1], max_tokens=1)

            await self.until_held(mirror, prompt, 0)
            assert not mirror.teller.blocks


def held(mirror, prompt):
    """How many blocks of a prompt it is said to hold, from the start."""
    chain = blocks(prompt)
    return next(
        (n for n, block in enumerate(chain) if block not in mirror.teller.blocks), len(chain)
    )


class TestOrder:
    async def test_priority_orders_those_that_wait(self, server):
        """All seats are taken and one falls free; the header's and the body's lowest number go first."""
        order = []
        before = await server.metric("num_preemptions_total")
        busy = [await server.begun(prompt=[1], priority=-100, **ENDLESS) for _ in range(4)]

        async def one(name, body, header=None):
            headers = {"X-Vllm-Priority": header} if header else None
            await server.stream(
                prompt=[2],
                max_tokens=20,
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
        await cancelled(busy[0])
        await asyncio.gather(*waiting)

        assert order == ["high", "mid", "low", "low again"]
        assert await server.metric("num_preemptions_total") == before
        await cancelled(*busy)

    async def test_the_urgent_take_blocks_but_not_seats(self, engine):
        """When the KV cache runs short the patient are preempted, computed again, and lose no token."""
        async with engine(max_num_seqs=4, max_model_len=1024, kv_tokens=1024) as server:
            before = await server.metric("num_preemptions_total")
            body = {"max_tokens": 400, "ignore_eos": True, "stream_options": USAGE}
            ends = []

            async def one(priority, seed):
                reply = await server.stream(prompt=prompt_of(seed, 64), priority=priority, **body)
                ends.append(priority)
                return reply

            replies = await asyncio.gather(one(10, 5), one(10, 6), one(0, 7), one(0, 8))

            assert await server.metric("num_preemptions_total") > before
            assert [reply.usage["completion_tokens"] for reply in replies] == [400] * 4
            assert ends == [0, 0, 10, 10]

    async def test_load_counts_what_is_in_the_server(self, server):
        """Running and waiting together."""
        tasks = [asyncio.create_task(server.stream(prompt=[1], **ENDLESS)) for _ in range(7)]
        await server.until("num_requests_waiting", 3)

        assert json.loads((await server.get("/load"))[1]) == {"server_load": 7}
        assert await server.metric("num_requests_running") == 4
        assert await server.metric("num_requests_waiting_by_reason", reason="capacity") == 3
        await cancelled(*tasks)


class TestAborts:
    async def test_a_client_that_leaves_frees_its_seat(self, server):
        """Stream or not: nothing runs on."""
        for is_stream in (True, False):
            task = asyncio.create_task(server.ask(prompt=[1], stream=is_stream, **ENDLESS))
            await server.until("num_requests_running", 1)
            task.cancel()
            await server.until("num_requests_running", 0)

        await server.until("kv_cache_usage_perc", 0)

    @pytest.mark.parametrize(
        ("path", "body", "request_id", "is_known"),
        [
            ("/v1/completions", {"prompt": [1]}, "cmpl-me-0", True),
            ("/v1/completions", {"prompt": [1]}, "cmpl-me", False),
            (CHAT, {"messages": [{"role": "user", "content": "x"}]}, "chatcmpl-me", True),
        ],
    )
    async def test_abort_wants_the_engines_own_id(self, server, path, body, request_id, is_known):
        """Completions need the -0; any other id is 200 and does nothing."""
        task = await server.begun(path=path, headers={"X-Request-Id": "me"}, **body, **ENDLESS)

        status, _ = await server.post("/inference/v1/abort_requests", {"request_ids": [request_id]})

        assert status == 200
        if is_known:
            reply = await task
            assert (reply.finish_reason, reply.is_done) == ("abort", True)
        else:
            before = await server.metric("generation_tokens_total")
            while await server.metric("generation_tokens_total") == before:
                assert not task.done()
        await cancelled(task)


class TestPauses:
    async def test_a_waiting_pause_returns_when_the_running_are_done(self, server):
        """And holds new work until it is resumed: a drain that does not end."""
        running = await server.begun(
            prompt=[1], max_tokens=500, ignore_eos=True, stream_options=USAGE
        )

        await server.post("/pause?mode=wait")

        assert (await running).usage["completion_tokens"] == 500
        held = asyncio.create_task(server.stream(prompt=[1], max_tokens=2))
        await server.until_load(1)
        assert json.loads((await server.get("/is_paused"))[1]) == {"is_paused": True}
        assert (await server.get("/health"))[0] == 200
        assert not held.done()
        await server.post("/resume")
        assert (await held).finish_reason == "length"

    async def test_a_keeping_pause_freezes_the_running(self, server):
        """They go on where they were."""
        running = await server.begun(prompt=[1], **ENDLESS)

        await server.post("/pause?mode=keep")
        await asyncio.sleep(0.1)  # the step under way still ends, and its metrics come after it
        before = await server.metric("generation_tokens_total")
        for _ in range(20):
            assert await server.metric("generation_tokens_total") == before
        assert not running.done()
        await server.post("/resume")

        while await server.metric("generation_tokens_total") == before:
            assert not running.done()
        await cancelled(running)

    async def test_an_aborting_pause_ends_the_running(self, server):
        """With finish reason abort."""
        running = await server.begun(prompt=[1], **ENDLESS)

        await server.post("/pause?mode=abort")

        assert (await running).finish_reason == "abort"

    @pytest.mark.parametrize(
        ("level", "state"), [(1, "weights_offloaded"), (2, "discard_all"), (0, None)]
    )
    async def test_asleep_it_looks_healthy_and_hangs(self, server, level, state):
        """Sleep state and pause tell, /health does not; `/wake_up` lets the request through."""
        assert (await server.post(f"/sleep?level={level}"))[0] == 200
        held = asyncio.create_task(server.stream(prompt=[1], max_tokens=2))
        await server.until_load(1)

        assert (await server.get("/health"))[0] == 200
        for name in ("awake", "weights_offloaded", "discard_all"):
            value = await server.metric("engine_sleep_state", sleep_state=name)
            assert value == (name == state)
        assert json.loads((await server.get("/is_sleeping"))[1]) == {"is_sleeping": True}
        assert json.loads((await server.get("/is_paused"))[1]) == {"is_paused": True}
        assert not held.done()
        await server.post("/wake_up")
        assert (await held).finish_reason == "length"


class TestMetrics:
    async def test_names_kinds_and_labels_are_vllms(self, server, engine):
        """The emulator shows a part of them, and nothing of its own."""
        await server.ask(prompt=[1], max_tokens=2)
        _, text = await server.get("/metrics")
        known = json.loads(Path(__file__).with_name("metrics.json").read_text())

        shown = families(text)

        if engine.is_real:
            assert known.items() <= shown.items()  # some come with their first event
        else:
            assert shown.items() <= known.items()

    async def test_what_headgate_reads_is_there(self, server):
        """Load and cache, by the names the sidecar reads."""
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert await server.metric(name) == 0
        assert await server.metric("cache_config_info", block_size=32) == 1

    async def test_every_request_is_counted_once(self, server):
        """In each of its histograms."""
        names = ("time_to_first_token", "request_queue_time", "request_prefill_time")
        before = [await server.metric(f"{name}_seconds_count") for name in names]
        gaps = await server.metric("inter_token_latency_seconds_count")

        await server.ask(prompt=[1] * 64, max_tokens=101, ignore_eos=True)

        for name, count in zip(names, before, strict=True):
            await server.until(f"{name}_seconds_count", count + 1)
        assert await server.metric("inter_token_latency_seconds_count") == gaps + 100


def families(text):
    """Each family's kind and labels."""
    kinds, found = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE vllm:"):
            _, _, name, kind = line.split()
            kinds[name] = kind
        elif line.startswith("vllm:"):
            name, _, rest = line.partition("{")
            for suffix in ("_bucket", "_count", "_sum"):
                if kinds.get(name.removesuffix(suffix)) == "histogram":
                    name = name.removesuffix(suffix)
            if name.endswith("_created") or name in found:
                continue
            labels = sorted(part.partition("=")[0] for part in rest.rpartition("}")[0].split(","))
            is_info = name.endswith("_info")  # its labels are the engine's arguments
            found[name] = [kinds[name], [] if is_info else [one for one in labels if one != "le"]]
    return found


class TestEnds:
    async def test_sigterm_aborts_the_running_with_a_200(self, engine):
        """Finish reason abort and [DONE]; or an error and [DONE], or nothing more at all, where the engine was killed first.

        Which of the three a real server does is chance: it tells its engine to abort, and kills it in the same moment.
        Whatever it says, it never calls the answer complete, and the port is closed.
        """
        async with engine(is_ended=True) as server:
            running = await server.begun(prompt=[1], **ENDLESS)

            server.terminate()
            await server.gone()
            done, _ = await asyncio.wait([running], timeout=1)

            if done:
                reply = running.result()
                assert (reply.status, reply.is_done) == (200, True)
                assert reply.finish_reason == "abort" or reply.error["code"] == 500
            assert engine.is_real or (done and reply.finish_reason == "abort")
            with pytest.raises(aiohttp.ClientConnectorError):
                await server.get("/health")
            await cancelled(running)

    async def test_a_drain_finishes_the_running_and_says_nothing_to_the_new(self, engine):
        """New requests: 200, no token; `/health` stays 200 meanwhile."""
        async with engine(shutdown_timeout=20, is_slow=True, is_ended=True) as server:
            held = await server.begun(
                prompt=[1], max_tokens=1500, ignore_eos=True, stream_options=USAGE
            )

            server.terminate()
            await asyncio.sleep(0.1)  # a signal has no answer
            stream = await server.stream(prompt=[1], max_tokens=4, stream_options=USAGE)
            whole = await server.ask(prompt=[1], max_tokens=4)

            assert (stream.status, stream.said, stream.is_done) == (200, "", True)
            assert stream.usage["completion_tokens"] == 0
            assert stream.finish_reason is None
            assert (whole.status, whole.finish_reason) == (200, "abort")
            assert whole.usage["completion_tokens"] == 0
            assert (await server.get("/health"))[0] == 200
            assert (await held).usage["completion_tokens"] == 1500
            await server.gone()

    async def test_an_engine_that_dies_ends_every_answer_in_an_error(self, engine):
        """Inside a 200 for streams, with the status for others; then the port is closed."""
        async with engine(is_ended=True) as server:
            running = await server.begun(prompt=[1], **ENDLESS)
            whole = asyncio.create_task(server.ask(prompt=[1], **ENDLESS))
            await server.until("num_requests_running", 2)

            server.crash()
            stream = await running

            assert (stream.status, stream.error["code"], stream.is_done) == (200, 500, True)
            assert stream.finish_reason is None
            assert (await whole).status == 500
            await server.gone()
