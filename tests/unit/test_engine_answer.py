"""An engine's stream: what is a success, what is not, and what is put together from it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.errors import EngineError
from scheduler.wire.dispatcher import Job
from workers import answer as answers
from workers.answer import OVERRUN_TOKENS, Answer, fault_in, refusal
from workers.body import Written
from workers.halves import NO_KV

JOB = Job(
    id="r1",
    entry="1-0",
    attempt=1,
    epoch=1,
    model="m",
    path="/v1/chat/completions",
    enqueued_at=0.0,
    decided_at=0.0,
)


def event(**fields):
    return (
        b"data: " + msgspec.json.encode({"id": "c1", "created": 7, "model": "m"} | fields) + b"\n\n"
    )


def said(content, finish=None, index=0, **more):
    return event(
        choices=[{"index": index, "delta": {"content": content, **more}, "finish_reason": finish}]
    )


def usage(n_out, n_in=10, cached=4):
    details = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
    return event(choices=[], usage=details | {"prompt_tokens_details": {"cached_tokens": cached}})


DONE = b"data: [DONE]\n\n"
GOOD = said("Hel") + said("lo") + said("", "stop") + usage(3) + DONE


DIED = event(error={"message": "EngineCore died", "code": 500})


def fed(*parts):
    answer = Answer()
    for part in parts:
        answer.feed(part)
    return answer


class TestOverrun:
    def fed(self, *parts, max_tokens=3):
        answer = Answer(max_tokens=max_tokens)
        for part in parts:
            answer.feed(part)
        return answer

    def test_a_few_too_many_pass(self):
        """What comes in one piece with the last token, and pieces that are no token; one more is an overrun."""
        within = [said("x")] * (3 + OVERRUN_TOKENS)
        assert not self.fed(*within).is_overrun
        assert self.fed(*within, said("x")).is_overrun
        assert not self.fed(*within, said("x"), max_tokens=None).is_overrun

    def test_tokens_count_where_the_engine_counts_them(self):
        """A piece may be several."""
        assert not self.fed(said("xx"), usage(3 + OVERRUN_TOKENS)).is_overrun
        assert self.fed(said("xx"), usage(4 + OVERRUN_TOKENS)).is_overrun

    def test_each_choice_has_its_own(self):
        """Of two there may be twice as many."""
        both = [said("x"), said("y", index=1)]
        assert not self.fed(*both * (3 + OVERRUN_TOKENS)).is_overrun
        assert self.fed(*both * (4 + OVERRUN_TOKENS)).is_overrun

    def test_what_has_ended_is_whole(self):
        """It came in the same packet as what was too much."""
        assert not self.fed(said("x") * (4 + OVERRUN_TOKENS) + said("", "stop") + DONE).is_overrun

    def test_what_is_cut_is_an_answer_as_long_as_it_may_be(self):
        """With the engine's own count where that has come, else with what was seen."""
        answer = self.fed(said("x"), said("y", "stop", index=1), said("z"))
        answer.cut(prompt_tokens=9)
        answer.check()
        response = msgspec.json.decode(answer.response(JOB))
        assert [one["finish_reason"] for one in response["choices"]] == ["length", "stop"]
        assert response["usage"]["completion_tokens"] == 3
        assert response["usage"]["prompt_tokens"] == 9

        counted = self.fed(said("x"), usage(30))
        counted.cut(prompt_tokens=9)
        assert (counted.output_tokens, counted.prompt_tokens()) == (30, 10)


class TestSuccess:
    def test_tokens_are_counted_by_usage(self):
        """Two pieces, three tokens: the engine's own count holds."""
        answer = fed(GOOD)
        answer.check()

        assert answer.output_tokens == 3
        assert answer.take() == ("Hello", "", 2)
        assert answer.take() == ("", "", 0), "what was taken is told once"

    def test_what_goes_on_from_a_prompt_is_text_and_no_message(self):
        """As OpenAI's completions say it."""
        parts = [event(choices=[{"index": 0, "text": text}]) for text in ("Hel", "lo")]
        last = event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
        job = msgspec.structs.replace(JOB, path="/v1/completions")

        response = msgspec.json.decode(fed(*parts, last, usage(3), DONE).response(job))

        assert response["object"] == "text_completion"
        [choice] = response["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
        assert "message" not in choice

    def test_times_that_come_last_are_read(self):
        """vLLM's own queue time, where it is asked to say it."""
        last = event(choices=[], metrics={"queue_time_ms": 5.0})

        assert fed(GOOD).metrics is None
        assert fed(GOOD.removesuffix(DONE), last, DONE).metrics.queue_time_ms == 5.0

    def test_the_response_is_as_if_sent_whole(self):
        """Content, finish reason, usage with cached tokens, id, model, created."""
        response = msgspec.json.decode(fed(GOOD).response(JOB))

        assert response == {
            "id": "c1",
            "object": "chat.completion",
            "created": 7,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello"},
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": 10,
                "total_tokens": 13,
                "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        }

    @pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "repetition"])
    def test_an_engine_ends_for_its_own_reasons(self, reason):
        """`repetition`: of vLLM's `repetition_detection`, for whom the answer is one."""
        answer = fed(said("Hello", reason), usage(3), DONE)

        answer.check()

        assert msgspec.json.decode(answer.response(JOB))["choices"][0]["finish_reason"] == reason

    def test_tokens_as_numbers_are_in_it_where_they_were_asked_for(self):
        """`return_token_ids`: a chat's prompt stands beside the choices, a completion's in each, as vLLM has it."""
        answer = Answer(keeps_news=False)
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        answer.feed(event(choices=[first], prompt_token_ids=[7, 8]))
        answer.feed(said("Hel") + event(choices=[{"index": 0, "text": "", "token_ids": [1]}]))
        answer.feed(
            event(choices=[{"index": 1, "text": "x", "token_ids": [2], "prompt_token_ids": [7]}])
        )

        response = msgspec.json.decode(answer.response(JOB))

        assert response["prompt_token_ids"] == [7, 8]
        assert [choice["token_ids"] for choice in response["choices"]] == [[1], [2]]
        assert response["choices"][1]["prompt_token_ids"] == [7]

    def test_tokens_spent_on_reasoning_are_told(self):
        """As the engine counts them, of an answer that nobody had begun before."""
        counts = {"prompt_tokens": 1, "completion_tokens": 3}
        details = {"completion_tokens_details": {"reasoning_tokens": 2}}
        answer = fed(said("Hello", "stop"), event(choices=[], usage=counts | details), DONE)

        usage = msgspec.json.decode(answer.response(JOB))["usage"]
        continued = msgspec.json.decode(answer.response(JOB, Written(text="Oh. ", pieces=2)))[
            "usage"
        ]

        assert usage["completion_tokens_details"] == {"reasoning_tokens": 2}
        assert "completion_tokens_details" not in continued

    def test_what_earlier_attempts_wrote_is_part_of_it(self):
        """Text and tokens of all attempts; what was continued is output, not prompt."""
        written = Written(text="Oh. ", pieces=2, output_tokens=2)
        response = msgspec.json.decode(fed(GOOD).response(JOB, written))

        assert response["choices"][0]["message"]["content"] == "Oh. Hello"
        assert response["usage"]["completion_tokens"] == 5
        assert response["usage"]["prompt_tokens"] == 8

    def test_what_comes_once_may_come_anywhere(self):
        """Usage, times and an id in any chunk hold, whatever later chunks leave out or say again."""
        times = event(choices=[], metrics={"queue_time_ms": 5.0})
        answer = fed(times, usage(3), said("Hel"), event(id="c2", choices=[]), said("lo", "stop"))
        answer.check()

        assert answer.metrics.queue_time_ms == 5.0
        assert answer.output_tokens == 3
        assert msgspec.json.decode(answer.response(JOB))["id"] == "c1"

    def test_an_engine_that_does_not_say_who_it_is(self):
        """The request's own id and model stand in for what is missing; one named late is named."""
        nameless = event(id="", model="", choices=[{"index": 0, "text": "x"}])
        assert self._head(nameless) == {"id": "r1", "model": "m", "created": 0}

        late = event(id="c9", model="n", created=5, choices=[])
        assert self._head(nameless, late) == {"id": "c9", "model": "n", "created": 5}

    @staticmethod
    def _head(*parts):
        response = msgspec.json.decode(fed(*parts).response(JOB))
        return {name: response[name] for name in ("id", "model", "created")}

    def test_what_ended_it_is_told(self):
        """The string or token of the request's own that the engine stopped at."""
        last = {"index": 0, "text": "x", "finish_reason": "stop", "stop_reason": "END"}

        [choice] = msgspec.json.decode(fed(event(choices=[last])).response(JOB))["choices"]

        assert choice["stop_reason"] == "END"

    def test_the_second_choice_is_no_text_of_the_first(self):
        """In the log it comes as the engine's own chunk; an answer nobody listens to gathers nothing."""
        two = said("a") + event(choices=[{"index": 1, "delta": {"content": "b"}}])
        answer, quiet = fed(two), Answer(keeps_news=False)
        quiet.feed(two)

        text, chunks, pieces = answer.take()
        assert (text, pieces) == ("a", 2)
        assert [one["choices"][0]["index"] for one in msgspec.json.decode(chunks)] == [1]
        assert (quiet.fresh_text, quiet.fresh_chunks) == ([], [])

    def test_what_gathers_is_weighed(self):
        """While Redis is away the longest answers are given up by it; what was taken weighs nothing."""
        answer = fed(said("x" * 1000))
        assert 1000 < answer.fresh_bytes < 1200
        answer.feed(said("x" * 1000))
        assert 2000 < answer.fresh_bytes < 2400

        answer.take()

        assert answer.fresh_bytes == 0

    def test_all_may_have_been_said_before(self):
        """A continued attempt that ends at once is no empty answer; nor one shorter than what went before."""
        written = Written(text="Oh. ", pieces=2, output_tokens=5)

        fed(said("", "stop") + usage(0) + DONE).check(written)
        fed(said("a", "stop") + usage(2) + DONE).check(written)

    @pytest.mark.parametrize(
        ("leg", "kv_params", "spared"),
        [("whole", b"", 4), ("decode", b'{"at":1}', 3), ("decode", NO_KV, 4)],
    )
    def test_what_was_cached_is_said_by_who_computed_it(self, leg, kv_params, spared):
        """To an engine that fetched a prompt's KV all of it may be cached: the first leg's engine knows better."""
        job = msgspec.structs.replace(JOB, leg=leg, kv_params=kv_params, kv_cached_tokens=3)

        usage = msgspec.json.decode(fed(GOOD).response(job))["usage"]

        assert usage["prompt_tokens_details"] == {"cached_tokens": spared}

    def test_tool_calls_come_in_pieces(self):
        """Names once, arguments bit by bit; the log keeps the engine's own chunks."""
        head = {
            "index": 0,
            "id": "t1",
            "type": "function",
            "function": {"name": "f", "arguments": ""},
        }
        parts = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"a"', ":1}")]
        stream = [said(None, tool_calls=[call]) for call in (head, *parts)]
        answer = fed(*stream, said("", "tool_calls"), usage(5), DONE)
        answer.check()

        [call] = msgspec.json.decode(answer.response(JOB))["choices"][0]["message"]["tool_calls"]
        assert call == {
            "id": "t1",
            "type": "function",
            "function": {"name": "f", "arguments": '{"a":1}'},
        }
        text, chunks, pieces = answer.take()
        assert (text, len(msgspec.json.decode(chunks)), pieces) == ("", 3, 3)
        assert answer.take() == ("", "", 0)

    def test_log_probabilities_are_joined(self):
        """Lists of each chunk one behind the other."""
        stream = [
            event(
                choices=[
                    {"index": 0, "delta": {"content": c}, "logprobs": {"content": [{"token": c}]}}
                ]
            )
            for c in "ab"
        ]
        answer = fed(*stream, said("", "stop"), usage(2), DONE)

        [choice] = msgspec.json.decode(answer.response(JOB))["choices"]
        assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}

    @given(st.lists(st.integers(1, len(GOOD) - 1), max_size=8))
    def test_where_packets_break_does_not_matter(self, cuts):
        """Any division of the same bytes gives the same answer."""
        ends = [*sorted(set(cuts)), len(GOOD)]
        parts = [GOOD[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        answer = fed(*parts)
        answer.check()

        assert answer.response(JOB) == fed(GOOD).response(JOB)

    def test_comments_and_carriage_returns_are_no_matter(self):
        """Proxies in between add both."""
        fed(b": ping\n\n", GOOD.replace(b"\n", b"\r\n")).check()

    @pytest.mark.parametrize("line", [b": ping", b"event: message", b"id: 7", b"retry: 10", b""])
    def test_what_stands_beside_the_data_takes_none_of_it_along(self, line):
        """An event may have a comment and other fields, in lines before or behind its data."""
        for stream in (
            GOOD.replace(b"data:", line + b"\ndata:"),
            GOOD.replace(b"\n\n", b"\n" + line + b"\n\n"),
        ):
            assert fed(stream).response(JOB) == fed(GOOD).response(JOB)

    @pytest.mark.parametrize(
        "more", [GOOD, said("more"), b"junk\n\n", b"data: [DONE]\n\n", b'data: {"id"']
    )
    def test_nothing_behind_done_is_of_the_answer(self, more):
        """Whatever it is, in the same packet or in another, as for a client of the engine itself."""
        for parts in ((GOOD + more,), (GOOD, more)):
            answer = fed(*parts)
            answer.check()
            assert answer.response(JOB) == fed(GOOD).response(JOB)

    @pytest.mark.parametrize("n_missing", [1, 2])
    def test_done_needs_no_empty_line(self, n_missing):
        """All is said: an engine that ends its stream there has not broken off."""
        fed(GOOD[:-n_missing]).check()

    def test_bytes_that_are_no_text_in_a_field_not_read(self):
        """They are passed on as what stands for them: the log is written for all attempts at once."""
        answer = fed(said("a", reasoning="b").replace(b'"m"', b'"m","odd":"\xff"'))

        _, chunks, _ = answer.take()

        assert msgspec.json.decode(chunks)[0]["odd"] == "\ufffd"

    def test_a_chunk_may_have_no_choices_at_all(self):
        """Some say null where vLLM says []."""
        fed(event(choices=None), GOOD).check()

    @pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
    def test_a_long_event_is_put_together_once(self, end):
        """In many packets it costs what it costs in one, and ends wherever its end is cut."""
        answer = Answer()
        long = said("x" * 10_000)[:-2]
        for at in range(len(long)):
            assert not answer.feed(long[at : at + 1])
        assert len(answer._rest) == len(long)

        heard = [answer.feed(end[at : at + 1]) for at in range(len(end))]

        assert heard[-1]
        assert answer.take()[0] == "x" * 10_000


class TestFailure:
    @pytest.mark.parametrize("more", [{}, {"reasoning": "y" * 9}])
    def test_an_answer_without_end_is_none(self, monkeypatch, more):
        """However small its pieces: it would fill the worker's memory, and Redis would not take it."""
        monkeypatch.setattr(answers, "ANSWER_BYTES", 1000)
        answer = Answer(keeps_news=False)

        with pytest.raises(EngineError, match="an answer of over 1000 bytes"):
            answer.feed(said("x" * 9, **more) * 200)

    def test_an_event_without_end_is_none(self, monkeypatch):
        """It would be kept until its end came."""
        monkeypatch.setattr(answers, "EVENT_BYTES", 1000)
        answer = Answer()
        for _ in range(10):
            answer.feed(b"x" * 100)

        with pytest.raises(EngineError, match="an event of over 1000 bytes"):
            answer.feed(b"x")

    def test_what_is_no_text_counts_as_well(self, monkeypatch):
        """A hundred calls of tools are no less memory for saying nothing."""
        monkeypatch.setattr(answers, "ANSWER_BYTES", 1000)
        call = said(None, tool_calls=[{"index": 0, "function": {"arguments": "y"}}])

        with pytest.raises(EngineError, match="an answer of over 1000 bytes"):
            Answer(keeps_news=False).feed(call * 100)

    @pytest.mark.parametrize(
        ("stream", "words"),
        [
            pytest.param(b"", "without a finish reason", id="nothing"),
            pytest.param(DONE, "without a finish reason", id="only [DONE]"),
            pytest.param(said("a") + usage(1), "broke off", id="cut"),
            pytest.param(said("a") + said("", "abort") + usage(1) + DONE, "abort", id="abort"),
            pytest.param(said("", "stop") + usage(0) + DONE, "no tokens", id="no tokens"),
            pytest.param(said("a", "stop") + DONE, "no tokens", id="no usage"),
            pytest.param(said("a") + b'data: {"id"', "ended inside", id="half a chunk"),
            pytest.param(DIED, "EngineCore", id="error"),
            pytest.param(
                GOOD.removesuffix(DONE) + DIED + event(metrics={}) + DONE,
                "EngineCore",
                id="error behind a whole answer",
            ),
        ],
    )
    def test_a_200_proves_nothing(self, stream, words):
        """Every kind of unsuccessful 200 may be tried again."""
        with pytest.raises(EngineError, match=words) as caught:
            fed(stream).check()
        assert caught.value.retryable

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param({"usage": {"prompt_tokens": 1, "completion_tokens": 10**30}}, id="absurd"),
            pytest.param({"usage": {"prompt_tokens": -7, "completion_tokens": 1}}, id="negative"),
            pytest.param({"choices": [{"index": -1, "text": "a"}]}, id="no place"),
            pytest.param({"choices": [{"index": 10**9, "text": "a"}]}, id="too many choices"),
        ],
    )
    def test_a_number_that_cannot_be_is_named(self, wrong):
        """Nobody is to learn from it, or to keep room for it."""
        with pytest.raises(EngineError, match=r"a chunk cannot be read \(Expected `int` [<>]= "):
            fed(event(**wrong))

    @pytest.mark.parametrize(
        ("first", "second", "words"),
        [
            ({"function": "x"}, {"function": {"name": "x"}}, "'function' was 'x', is an object"),
            ({"index": []}, {}, "index is '\\[\\]', wanted a number"),
        ],
    )
    def test_tool_calls_that_do_not_fit_together_are_the_engines_fault(self, first, second, words):
        """Not ours: no bug is logged for them."""
        with pytest.raises(EngineError, match=words):
            fed(said(None, tool_calls=[first]), said(None, tool_calls=[second]))

    @pytest.mark.parametrize(
        ("code", "status"), [(400, 400), (503, 503), (10**30, 0), (-1, 0), (200, 0), ("x", 0)]
    )
    def test_an_errors_code_is_its_status_where_it_can_be(self, code, status):
        """It goes into results and answers, where any other number would be one of ours."""
        with pytest.raises(EngineError) as caught:
            fed(event(error={"message": None, "code": code})).check()
        assert caught.value.status == status

    def test_an_error_in_place_of_a_stream_is_passed_on(self):
        """Some gateways say 200 and then a body that is no stream."""
        with pytest.raises(EngineError, match=r"^too long$") as caught:
            fed(b'{"error":{"message":"too long","code":400}}').check()
        assert not caught.value.retryable

    def test_an_engines_words_are_bounded(self):
        """They go into logs, results and beats."""
        with pytest.raises(EngineError) as caught:
            fed(event(error={"message": "x" * 10**6, "code": 500})).check()
        assert len(str(caught.value)) == answers.REASON_CHARS

    @pytest.mark.parametrize(
        "garbage",
        [
            b"<html>\n\n",
            b"data: {nope}\n\n",
            b'{"choices":[]}\n\n',
            pytest.param(b"data: " + b"[" * 10_000 + b"\n\n", id="a pit"),
        ],
    )
    def test_garbage_is_called_so_at_once(self, garbage):
        """Whatever is no event ends the attempt."""
        with pytest.raises(EngineError):
            fed(garbage)

    @pytest.mark.parametrize(
        ("status", "retryable"),
        [
            (400, False),
            (413, False),
            (422, False),
            (404, True),
            (429, True),
            (500, True),
            (503, True),
        ],
    )
    def test_who_is_to_blame(self, status, retryable):
        """A 4xx that names the request fails anywhere; what names the engine does not."""
        assert refusal(status, "").retryable is retryable

    @given(st.binary(max_size=200))
    def test_no_bytes_break_the_parser(self, noise):
        """It is an answer or an EngineError, nothing else."""
        try:
            fed(noise).check()
        except EngineError:
            return
        pytest.fail("noise passed for an answer")

    @pytest.mark.parametrize(
        "body",
        [
            b'{"error":{"message":"too long","code":400}}',
            b'{"message":"too long","type":"x"}',
            b'{"detail":"too long"}',
            b'{"error":"too long"}',
            b"too long",
        ],
    )
    def test_the_message_is_found_in_every_shape(self, body):
        """vLLM's, older vLLM's, FastAPI's, a proxy's; and nothing but the message."""
        assert fault_in(body) == "too long"

    def test_what_is_no_json_is_its_own_message(self):
        """The beginning of it."""
        assert fault_in(b"too long" + b"[" * 10_000).startswith("too long[[")

    @pytest.mark.parametrize("body", [b"null", b"{}", b"[]", b'{"error":null}'])
    def test_no_message_is_none(self, body):
        """The status alone says what it is."""
        assert str(refusal(503, fault_in(body))) == "Service Unavailable"
