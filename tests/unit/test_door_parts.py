"""The door's pure parts: what a request asks for, how a log becomes chunks, how a refusal is worded."""

import json
import re

import pytest

from dispatcher.client.handle import Piece
from dispatcher.door import headers, refusal
from dispatcher.door.ask import understand
from dispatcher.door.chunks import Chunks
from dispatcher.door.desk import TRIES_MAX, _names
from dispatcher.door.keyring import Keyring
from dispatcher.door.refusal import Refusal
from scheduler.errors import SettingsError
from scheduler.settings import DoorSettings
from scheduler.wire.words import PATHS
from scheduler.wire.worker import Result

CHAT, COMPLETIONS = PATHS


def asked(path=CHAT, /, said=None, **body):
    words = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return understand(json.dumps({"model": "m"} | words | body).encode(), path, said or {})


class TestHeaders:
    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            pytest.param({"x-llm-d-inference-objective": "chat"}, {"objective": "chat"}, id="obj"),
            pytest.param({"x-llm-d-inference-fairness-id": "t"}, {"tenant": "t"}, id="tenant"),
            pytest.param({"x-llm-d-slo-ttft-ms": "250"}, {"ttft_s": 0.25}, id="ttft"),
            pytest.param({"x-llm-d-slo-tpot-ms": "12.5"}, {"tpot_s": 0.0125}, id="tpot"),
            pytest.param({"x-llm-d-inference-ttl": "1m30s"}, {"max_queue_s": 90.0}, id="ttl"),
            pytest.param({"x-llm-d-inference-ttl": "0s"}, {"max_queue_s": None}, id="no ttl"),
            pytest.param({"x-headgate-max-queue-ms": "5"}, {"max_queue_s": 0.005}, id="queue"),
            pytest.param({"x-headgate-deadline-ms": "2000"}, {"deadline_s": 2.0}, id="deadline"),
            pytest.param(
                {"x-headgate-expected-tokens": "90"}, {"expected_tokens": 90}, id="expected"
            ),
            pytest.param({"x-vllm-priority": "5"}, {"priority": -5}, id="vllm's is lower first"),
            pytest.param(
                {"x-vllm-priority": "5", "x-headgate-priority": "7"}, {"priority": 7}, id="ours"
            ),
            pytest.param({"x-session-id": "s", "traceparent": ""}, {"session": "s"}, id="empty"),
        ],
    )
    def test_each_is_one_wish(self, said, expected):
        """Our own name wins over an alias; units become seconds."""
        assert headers.wishes(said) == expected

    @pytest.mark.parametrize(
        ("name", "value", "wanted"),
        [
            ("x-llm-d-slo-ttft-ms", "soon", "milliseconds"),
            ("x-headgate-deadline-ms", "-1", "more than 0"),
            ("x-headgate-deadline-ms", "nan", "more than 0"),
            ("x-llm-d-inference-ttl", "5", "a duration such as"),
            ("x-headgate-priority", "high", "a whole number"),
            ("x-headgate-tenant", "\udce9", "UTF-8"),
        ],
    )
    def test_a_bad_value_names_its_header(self, name, value, wanted):
        """400, and the message says what was found and what is wanted."""
        shown = re.escape(repr(value))
        with pytest.raises(Refusal, match=f"header '{name}' is {shown}, wanted.*{wanted}") as no:
            headers.wishes({name: value})

        assert (no.value.status, no.value.param) == (400, name)


class TestAsk:
    def test_the_body_decides_how_it_travels(self):
        """Model, path, stream and vLLM's priority; nothing else is read."""
        ask = asked(stream=True, stream_options={"include_usage": True}, priority=3)

        assert (ask.model, ask.is_stream, ask.has_usage) == ("m", True, True)
        assert ask.wishes == {"model": "m", "path": CHAT, "stream": True, "priority": -3}

    def test_an_id_that_can_be_none_is_replaced(self):
        """As every proxy does; a good one is kept."""
        assert asked(said={"x-request-id": "a b"}).name == ""
        assert asked(said={"x-request-id": "7f-1"}).name == "7f-1"

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b"{", "not JSON"),
            (b"[]", "Expected `object`"),
            (b"[" * 100_000, "not JSON|Expected"),
            (b'{"model": 7}', "Expected `str"),
            (b'{"messages": [1]}', "'model' is None"),
            (b'{"model": "m", "messages": []}', "'messages'"),
            (b'{"model": "m", "messages": "hi"}', "'messages'"),
            (b'{"model": "m", "messages": [1], "stream_options": {}}', "'stream_options'"),
            (b'{"model": "m", "messages": [1], "kv_transfer_params": {"a": 1}}', "'kv_transfer"),
        ],
    )
    def test_what_nobody_could_serve_is_refused(self, raw, message):
        """400 before anything is written anywhere."""
        with pytest.raises(Refusal, match=message) as no:
            understand(raw, CHAT, {})

        assert no.value.status == 400

    def test_empty_kv_params_pass(self):
        """A client that always sends the field is not turned away; the worker drops it."""
        assert asked(kv_transfer_params=None).model == "m"


class TestNames:
    def test_a_name_may_be_tried_again(self):
        """First under itself, then numbered; a key's holder has names of its own."""
        assert _names("r", None)[:2] == ["r", "r.2"]
        assert _names("r", "team")[0] == "team:r"
        assert len(_names("r", None)) == TRIES_MAX
        assert _names("", "team") == [""]


class TestKeyring:
    def test_a_key_is_a_tenant(self, tmp_path):
        """From a file and from a variable; comments and empty lines are none."""
        file = tmp_path / "keys"
        file.write_text("# ours\nsk-1 team-a\n\nsk-2 # a proxy, which says itself\n")
        settings = DoorSettings(api_keys_file=str(file), api_keys_variable="DOOR_KEYS")
        ring = Keyring.from_settings(settings, {"DOOR_KEYS": "sk-3 team-c,sk-4 team-d"})

        shown = [ring.tenant({"Authorization": f"Bearer sk-{n}"}) for n in (1, 2, 3, 4)]

        assert shown == ["team-a", "", "team-c", "team-d"]

    def test_the_scheme_has_no_case(self):
        """As HTTP has it, and as some clients write it."""
        assert Keyring({"sk-1": "a"}).tenant({"Authorization": "bearer sk-1"}) == "a"

    @pytest.mark.parametrize("said", ["", "Bearer", "Bearer ", "Bearer sk", "sk-1", "Basic sk-1"])
    def test_any_other_is_401(self, said):
        """Also none at all."""
        with pytest.raises(Refusal, match="no API key") as no:
            Keyring({"sk-1": "a"}).tenant({"Authorization": said})

        assert no.value.status == 401

    @pytest.mark.parametrize("tenant", ["a:b", "-a", "a/b"])
    def test_no_tenant_is_another_and_a_name(self, tenant):
        """Requests are named `tenant:name`: with a colon in it, one could ask for what another was answered."""
        settings = DoorSettings(api_keys_variable="DOOR_KEYS")

        with pytest.raises(SettingsError, match=f"has tenant '{tenant}', wanted letters"):
            Keyring.from_settings(settings, {"DOOR_KEYS": f"sk-1 {tenant}"})

    def test_a_key_without_a_tenant_has_no_tenants_names(self):
        """A proxy hands on the ids that its users say: none of them reads what a key's tenant was answered."""
        ring = Keyring({"sk-1": "a", "sk-2": ""})
        ring.check_name("a:r", "a")
        ring.check_name("b:r", "")
        ring.check_name("a", "")

        with pytest.raises(Refusal, match="x-request-id is 'a:r', wanted none that begins") as no:
            ring.check_name("a:r", "")

        assert no.value.status == 400

    def test_a_key_is_one_tenants(self, tmp_path):
        """Said of two, the last had it, and nobody heard of that; also over file and variable."""
        file = tmp_path / "keys"
        file.write_text("sk-1 a\nsk-1 a\n")
        settings = DoorSettings(api_keys_file=str(file), api_keys_variable="DOOR_KEYS")

        with pytest.raises(SettingsError, match=r"gives tenant 'b' a key that tenant 'a' has"):
            Keyring.from_settings(settings, {"DOOR_KEYS": "sk-1 b"})
        file.write_text("sk-1 a\nsk-1 b\n")
        with pytest.raises(SettingsError, match=r"door.api_keys_file gives tenant 'b' a key"):
            Keyring.from_settings(settings, {})

    def test_named_but_empty_stops_the_start(self, tmp_path):
        """A door that was meant to be locked never stands open."""
        with pytest.raises(SettingsError, match="holds no key"):
            Keyring.from_settings(DoorSettings(api_keys_variable="DOOR_KEYS"), {})
        with pytest.raises(SettingsError, match="wanted a readable file"):
            Keyring.from_settings(DoorSettings(api_keys_file=str(tmp_path / "no")), {})
        (tmp_path / "latin").write_bytes(b"sk-\xe9 a")
        with pytest.raises(SettingsError, match="not UTF-8"):
            Keyring.from_settings(DoorSettings(api_keys_file=str(tmp_path / "latin")), {})


class TestRefusal:
    @pytest.mark.parametrize(
        ("record", "is_served", "status", "reason", "retry_after"),
        [
            ({"outcome": "expired"}, True, 504, "expired", None),
            ({"outcome": "cancelled"}, True, 499, "cancelled", None),
            ({"outcome": "rejected", "retry_after_s": 2.2}, True, 429, "rejected", "3"),
            ({"outcome": "rejected", "retry_after_s": 60.0}, False, 503, "no_endpoint", "1"),
            ({"outcome": "failed", "status": 500}, True, 502, "failed", None),
            ({"outcome": "failed", "status": 422}, True, 422, "engine_refused", None),
            ({"outcome": "invalid", "reason": "field 'id' is"}, True, 400, "invalid", None),
            (
                {"outcome": "invalid", "reason": "field 'model' is"},
                True,
                404,
                "unknown_model",
                None,
            ),
        ],
    )
    def test_every_end_has_its_status(self, record, is_served, status, reason, retry_after):
        """And a word for programs; contended and empty tell when to come back."""
        no = refusal.of_record(Result(id="r", **record), is_served=is_served)

        assert (no.status, no.headers["x-headgate-reason"]) == (status, reason)
        assert no.headers.get("Retry-After") == retry_after
        assert json.loads(no.body())["error"]["code"] == status


def events(data):
    return [json.loads(line[6:]) for line in data.decode().split("\n\n") if line[6:7] == "{"]


def deltas(data):
    return [e["choices"][0].get("delta") or e["choices"][0]["text"] for e in events(data)]


def chunks(path=CHAT, /, **body):
    return Chunks(asked(path, stream=True, **body), request_id="r", created=7)


def rich(**delta):
    return {"id": "engine", "usage": {}, "choices": [{"index": 0, "delta": delta}]}


class TestChunks:
    def test_any_text_survives(self):
        """Quotes, line ends, marks and what JSON escapes."""
        text = 'a "b"\n @@@ \\ \u2028 \x01 é 😀'

        role, said = deltas(chunks().piece(Piece("1-0", text)))
        [plain] = deltas(chunks(COMPLETIONS).piece(Piece("1-0", text)))

        assert role == {"role": "assistant", "content": ""}
        assert (said["content"], plain) == (text, text)

    def test_rich_chunks_stand_where_their_words_stand(self):
        """The log's text holds the rich chunks' words too; each word is said once, in order."""
        logged = json.dumps([rich(content=" b"), rich(content=" d")])

        said = deltas(chunks().piece(Piece("1-0", " a b c d e", logged)))[1:]

        assert [delta["content"] for delta in said] == [" a", " b", " c", " d", " e"]

    def test_reasoning_before_tools_after(self):
        """Where a chunk has no words its kind decides."""
        logged = json.dumps([rich(reasoning="hm"), rich(tool_calls=[{"index": 0, "id": "t"}])])

        said = deltas(chunks().piece(Piece("1-0", "word", logged)))[1:]

        assert [next(iter(delta)) for delta in said] == ["reasoning", "content", "tool_calls"]

    def test_the_engine_is_not_seen(self):
        """Ids, usage and finish reasons of a chunk are the engine's own; the answer has one of each."""
        chunk = rich(content="x")
        chunk["choices"][0] |= {"finish_reason": "stop", "token_ids": [1], "logprobs": {"a": 1}}

        _, said = events(chunks().piece(Piece("1-0", "x", json.dumps([chunk]))))

        assert (said["id"], "usage" in said) == ("chatcmpl-r", False)
        assert said["choices"][0]["finish_reason"] is None
        assert said["choices"][0]["logprobs"] == {"a": 1}
        assert "token_ids" not in said["choices"][0]

    def test_the_record_ends_it(self):
        """Every choice's reason, then the usage where asked for, then [DONE]."""
        body = {
            "choices": [{"index": 0, "finish_reason": "stop", "stop_reason": 9}],
            "usage": {"a": 1},
        }
        one = chunks(stream_options={"include_usage": True})
        one.piece(Piece("1-0", "x"))

        data = one.end(Result(id="r", outcome="completed", body=json.dumps(body).encode()))

        finish, usage = events(data)
        assert (finish["choices"][0]["finish_reason"], finish["choices"][0]["stop_reason"]) == (
            "stop",
            9,
        )
        assert (usage["choices"], usage["usage"]) == ([], {"a": 1})
        assert data.endswith(b"data: [DONE]\n\n")

    def test_what_was_not_logged_is_said_at_the_end(self):
        """Who joins a request that does not stream gets it in one piece."""
        message = {"role": "assistant", "content": "all", "tool_calls": [{"id": "t"}]}
        body = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}

        data = chunks().end(Result(id="r", outcome="completed", body=json.dumps(body).encode()))

        assert deltas(data)[1] == {"content": "all", "tool_calls": [{"id": "t", "index": 0}]}
