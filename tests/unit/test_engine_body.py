"""What the engine is posted: always streamed, made safe, and continued where an attempt broke off."""

import msgspec
import pytest

from scheduler.errors import EngineError, WireError
from scheduler.wire.dispatcher import Job
from workers import body
from workers.body import Written

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WRITTEN = Written(text="once", pieces=3, output_tokens=4)


def job(path=CHAT, **more):
    return Job(
        id="r1",
        entry="1-0",
        attempt=2,
        epoch=1,
        model="m",
        path=path,
        enqueued_at=0.0,
        decided_at=0.0,
        stream=True,
        **more,
    )


def posted(client, path=CHAT, written=body.NOTHING, **options):
    ready = body.post(job(path), client, written, **options)
    return msgspec.json.decode(ready.data)


def hello(**more):
    return {"messages": [{"role": "user", "content": "hi"}], **more}


class TestSafe:
    def test_it_is_always_streamed_with_usage(self):
        """Whatever the client said of streams."""
        ready = posted(hello(stream=False, stream_options={"include_usage": False}))

        assert ready["stream"] is True
        assert ready["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}

    def test_transfer_parameters_are_stripped(self):
        """A client's could kill the engine."""
        assert "kv_transfer_params" not in posted(hello(kv_transfer_params={"x": 1}))

    @pytest.mark.parametrize(
        "pit", [b"[" * 10_000, b'{"messages":' + b"[" * 10_000], ids=["at once", "inside"]
    )
    def test_a_bottomless_body_is_unreadable(self, pit):
        """Brackets within brackets without end cost the request, never the worker."""
        with pytest.raises(WireError, match="body is not JSON"):
            body.read(pit, CHAT)

    @pytest.mark.parametrize(
        ("said", "is_sent"),
        [
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
            ("00-x\r\nX-Evil: 1", False),
            ("00-1\n", False),
            ("\u2603", False),
        ],
    )
    def test_only_a_trace_context_becomes_a_header(self, said, is_sent):
        """A line break there would be a header of the client's own, which the HTTP client refuses loudly."""
        headers = body.post(job(traceparent=said), hello()).headers

        assert ("traceparent" in headers) is is_sent

    def test_the_model_is_the_clients_own_where_it_names_one(self):
        """Only an absent one is filled in."""
        assert posted(hello())["model"] == "m"
        assert posted(hello(model="lora-1"))["model"] == "lora-1"

    def test_priority_is_turned_round(self):
        """Ours: higher first. vLLM's: lower first; and only engines that order by it are told."""
        ready = body.post(job(priority=3), hello(), by_priority=True)

        assert msgspec.json.decode(ready.data)["priority"] == -3
        assert "priority" not in posted(hello())

    def test_the_engine_can_be_traced(self):
        """Request id with its attempt, and the trace's parent."""
        ready = body.post(job(traceparent="00-a-b-01"), hello())

        assert ready.headers["X-Request-Id"] == "r1-2"
        assert ready.headers["traceparent"] == "00-a-b-01"

    @pytest.mark.parametrize(
        ("raw", "path", "words"),
        [
            (b"{", CHAT, "not JSON"),
            (b"\xff", CHAT, "not JSON"),
            (b"[]", CHAT, "a JSON list"),
            (b"{}", CHAT, "'messages'"),
            (b'{"messages": "hi"}', CHAT, "wanted a list"),
            (b'{"messages": []}', TEXT, "'prompt'"),
        ],
    )
    def test_what_no_engine_could_serve_is_refused(self, raw, path, words):
        """With the reason."""
        with pytest.raises(WireError, match=words):
            body.read(raw, path)


class TestContinued:
    def test_a_chat_goes_on_in_its_own_message(self):
        """The text so far stands as the assistant's unfinished message."""
        ready = posted(hello(), written=WRITTEN)

        assert ready["messages"][-1] == {"role": "assistant", "content": "once"}
        assert (ready["continue_final_message"], ready["add_generation_prompt"]) == (True, False)

    def test_a_message_the_client_left_open_is_lengthened(self):
        """Two assistant messages in a row would be another conversation."""
        client = hello(continue_final_message=True, add_generation_prompt=False)
        client["messages"].append({"role": "assistant", "content": "Well, "})

        assert posted(client, written=WRITTEN)["messages"][-1]["content"] == "Well, once"

    def test_a_text_goes_on_after_it(self):
        """Prompt and text are one."""
        assert posted({"prompt": "hi "}, TEXT, WRITTEN)["prompt"] == "hi once"

    def test_ids_go_on_with_ids(self):
        """Where the log knows them."""
        written = Written(text="xy", pieces=2, output_tokens=2, ids=(7, 8), is_plain=False)

        assert posted({"prompt": [1, 2]}, TEXT, written)["prompt"] == [1, 2, 7, 8]

    def test_limits_are_for_the_whole_answer(self):
        """What was said is taken off every count."""
        client = hello(max_tokens=10, min_tokens=3, vllm_xargs={"output_tokens": 9})
        ready = posted(client, written=WRITTEN)

        assert (ready["max_tokens"], ready["min_tokens"]) == (6, 0)
        assert ready["vllm_xargs"] == {"output_tokens": 5}

    def test_nothing_left_to_say_is_not_asked(self):
        """The earlier attempt had said all and only its end was lost."""
        assert body.post(job(), hello(max_tokens=4), WRITTEN).is_spent

    @pytest.mark.parametrize(
        "client",
        [
            hello(tools=[{"type": "function"}]),
            hello(logprobs=True),
            hello(n=2),
            hello(response_format={"type": "json_object"}),
            hello(structured_outputs={"regex": "a"}),
        ],
    )
    def test_what_cannot_be_continued_is_refused_with_the_reason(self, client):
        """No token is said twice; and no other engine could do better."""
        with pytest.raises(EngineError, match="cannot be continued") as caught:
            body.post(job(), client, WRITTEN)
        assert not caught.value.retryable

    def test_without_text_everything_may_start_again(self):
        """Nothing was written: there is nothing to continue."""
        assert posted(hello(n=2))["n"] == 2
