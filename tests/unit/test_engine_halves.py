"""Half a request: what the engine is posted of it, what it answers, and what is carried from one to the other."""

import msgspec
import pytest
from attempts import job

from scheduler.errors import EngineError
from scheduler.wire.words import KV_PARAMS_BYTES
from workers import body, halves, parked
from workers.answer import Answer
from workers.parked import Parked

KV = b'{"remote_block_ids":[1,2]}'


def posted(client, leg="prefill", kv_params=b""):
    return body.post(job(leg=leg, kv_params=kv_params), {"prompt": "x"} | client)


class TestPosted:
    def test_the_first_says_one_token_to_nobody(self):
        """In one piece, under whichever name the client gave its limit; and the KV is to be kept."""
        ready = msgspec.json.decode(
            posted({"max_completion_tokens": 50, "min_tokens": 9, "stream": True}).data
        )

        assert (ready["max_tokens"], ready["min_tokens"], ready["max_completion_tokens"]) == (
            1,
            1,
            1,
        )
        assert ready["stream"] is False
        assert "stream_options" not in ready
        assert ready["kv_transfer_params"]["do_remote_decode"] is True

    def test_a_limit_under_the_new_name_is_not_made_up(self):
        """Completions do not know it."""
        assert "max_completion_tokens" not in msgspec.json.decode(posted({}).data)

    def test_the_second_says_where_the_kv_is(self):
        """As the first engine put it; where it kept none the second computes all."""
        assert msgspec.json.decode(posted({}, "decode", KV).data)["kv_transfer_params"] == {
            "remote_block_ids": [1, 2]
        }
        assert "kv_transfer_params" not in msgspec.json.decode(
            posted({}, "decode", halves.NO_KV).data
        )

    @pytest.mark.parametrize(
        "client",
        [
            {"n": 2},
            {"best_of": 3},
            {"use_beam_search": True},
            {"prompt_logprobs": 0},
            {"echo": True, "logprobs": 1},
            {"prompt": ["a", "b"]},
            {"prompt": [[1, 2], [3]]},
        ],
    )
    def test_what_cannot_be_parted_is_not_asked(self, client):
        """Whoever decodes computes it: an answer that needs the prompt computed beside it, or several answers."""
        assert halves.obstacle(client)
        assert posted(client).is_spent

    @pytest.mark.parametrize(
        "client",
        [
            {"n": 1, "best_of": None},
            {"use_beam_search": False},
            {"echo": True},
            {"logprobs": 3},
            {"prompt": [1, 2, 3]},
            {"prompt": []},
        ],
    )
    def test_all_else_can(self, client):
        """Also with log probabilities of the answer, or a prompt of token ids."""
        assert halves.obstacle(client) == ""


class TestCarried:
    @pytest.mark.parametrize(
        ("kv_params", "words"),
        [
            (b"[1]", "wanted a JSON object"),
            (b"{", "wanted a JSON object"),
            (b'{"a":"\xff"}', "wanted a JSON object"),
            (b'{"a":"' + b"x" * KV_PARAMS_BYTES + b'"}', f"wanted at most {KV_PARAMS_BYTES}"),
        ],
    )
    def test_what_cannot_be_carried_is_named(self, kv_params, words):
        """It would stand in the next engine's post, and in Redis until then."""
        with pytest.raises(EngineError, match=words):
            halves.checked(kv_params)
        with pytest.raises(EngineError, match=words):
            posted({}, "decode", kv_params)

    def test_the_longest_that_is_carried(self):
        """To the byte."""
        longest = b'{"a":"' + b"x" * (KV_PARAMS_BYTES - 8) + b'"}'

        assert halves.checked(longest) == longest


def told(*parts):
    answer, read = Answer(), Parked()
    for part in parts:
        read.feed(part)
    return read.told(answer), answer


class TestAnswered:
    def test_where_the_kv_is_and_what_it_cost(self):
        """However it is cut up; the token itself is nobody's."""
        whole = (
            b'{"choices":[{"text":"x"}],"usage":{"prompt_tokens":9,"completion_tokens":1},'
            b'"metrics":{"queue_time_ms":4},"kv_transfer_params":' + KV + b"}"
        )

        kv_params, answer = told(whole[:40], whole[40:])

        assert kv_params == KV
        assert (answer.usage.prompt_tokens, answer.output_tokens) == (9, 1)
        assert answer.metrics.queue_time_ms == 4
        assert answer.fresh_pieces == 0

    @pytest.mark.parametrize("said", [b"{}", b'{"kv_transfer_params":null}'])
    def test_an_engine_that_keeps_nothing_is_told_how(self, said):
        """It was started without a connector."""
        with pytest.raises(EngineError, match="--kv-transfer-config"):
            told(said)

    @pytest.mark.parametrize(
        ("said", "status", "words"),
        [
            (b'{"error":{"message":"too long","code":400}}', 400, "too long"),
            (b'{"error":"no room"}', 0, "no room"),
        ],
    )
    def test_an_error_inside_a_success_is_passed_on(self, said, status, words):
        """With its status, which says whether another engine may do better."""
        with pytest.raises(EngineError, match=words) as caught:
            told(said)
        assert (caught.value.status, caught.value.retryable) == (status, status != 400)

    def test_what_is_no_answer_is_called_so(self):
        """Garbage, half an answer."""
        with pytest.raises(EngineError, match="cannot be read"):
            told(b'{"usage":')

    def test_it_has_a_bound(self, monkeypatch):
        """An engine that sends without end is cut off when it passes it, not at the end."""
        monkeypatch.setattr(parked, "ANSWER_BYTES", 10)
        read = Parked()
        read.feed(b"12345")
        read.feed(b"67890")

        with pytest.raises(EngineError, match="over 10 bytes"):
            read.feed(b"1")
