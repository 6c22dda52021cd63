"""The flat codec: what a person may type, what we always write, and what each bad value is told."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import codec, servable
from scheduler.errors import WireError
from scheduler.wire.client import Request
from scheduler.wire.dispatcher import Job
from scheduler.wire.words import PATHS
from scheduler.wire.worker import Result


def typed(**fields):
    return {name.encode(): value.encode() for name, value in fields.items()}


def over_the_wire(message):
    fields = codec.encode(message)
    return codec.decode(
        type(message),
        {k.encode(): v if isinstance(v, bytes) else v.encode() for k, v in fields.items()},
    )


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
MILLISECONDS = st.integers(1, 10**9).map(lambda ms: ms / 1e3)


class Word(msgspec.Struct):
    text: str = ""


class TestRoundTrip:
    @given(text=NAMES)
    def test_a_message_may_have_one_field(self, text):
        assert over_the_wire(Word(text)) == Word(text)

    @given(
        id=NAMES,
        model=NAMES.filter(bool),
        body=st.binary(max_size=50),
        ttft_s=st.none() | MILLISECONDS,
        priority=st.none() | st.integers(-(10**6), 10**6),
        stream=st.booleans(),
        blocks=st.lists(st.from_regex(r"[0-9a-f]{12}", fullmatch=True), max_size=4).map(tuple),
    )
    def test_what_is_written_is_read(self, **fields):
        """Every message comes back equal, times to the microsecond."""
        request = Request(**fields)

        assert over_the_wire(request) == request

    def test_moments_keep_microseconds(self):
        """A unix moment survives as milliseconds with three decimals."""
        job = Job(
            id="a",
            entry="1-0",
            attempt=1,
            epoch=1763662000123,
            model="m",
            path=PATHS[0],
            enqueued_at=1763662000.123456,
            decided_at=1763662000.5,
        )

        assert abs(over_the_wire(job).enqueued_at - job.enqueued_at) < 1e-6
        assert codec.encode(job)["decided_at"] == "1763662000500"

    def test_we_write_all_fields_in_the_order_of_the_class(self):
        """Constant names in constant order: Redis packs such entries smallest."""
        names = [codec.wire_name(f) for f in Result.__struct_fields__]

        assert list(codec.encode(Result(id="a", outcome="completed"))) == names


class TestByHand:
    def test_model_and_body_are_enough(self):
        """A person's XADD needs two fields; the rest takes its defaults."""
        request = codec.decode(Request, typed(model="llama", body="{}"))

        assert request == Request(model="llama", body=b"{}")

    def test_unknown_fields_are_kept(self):
        """What we do not know is neither an error nor lost."""
        request = codec.decode(Request, typed(colour="green", model="llama"))

        assert request.extra == {"colour": "green"}
        assert codec.encode(request)["colour"] == "green"

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"body": "{}"}, "field 'model' is missing, wanted text"),
            (
                {"model": "m", "ttft_ms": "soon"},
                "field 'ttft_ms' is 'soon', wanted milliseconds, a number",
            ),
            (
                {"model": "m", "ttft_ms": "nan"},
                "field 'ttft_ms' is 'nan', wanted milliseconds, a finite",
            ),
            (
                {"model": "m", "deadline_ms": "1e999"},
                "field 'deadline_ms' is '1e999', wanted milliseconds",
            ),
            ({"model": "m", "priority": "1.5"}, "field 'priority' is '1.5', wanted a whole number"),
            ({"model": "m", "priority": "9" * 5000}, "wanted a whole number of at most 20 digits"),
            ({"model": "m", "stream": "maybe"}, "field 'stream' is 'maybe', wanted 1 or 0"),
        ],
    )
    def test_a_bad_value_is_named(self, fields, message):
        """The error names the field, the value found and the value wanted."""
        with pytest.raises(WireError) as caught:
            codec.decode(Request, typed(**fields))

        assert message in str(caught.value)

    def test_text_that_is_no_utf8_is_named(self):
        """Bytes in a text field do not crash the reader."""
        with pytest.raises(WireError, match=r"'tenant' .* wanted UTF-8 text"):
            codec.decode(Request, {b"model": b"m", b"tenant": b"\xff\xfe"})

    def test_a_word_outside_its_list_is_named(self):
        """A field of few words says which words there are."""
        with pytest.raises(WireError, match="wanted one of completed, expired"):
            codec.decode(Result, typed(id="a", outcome="vanished"))


class TestCheck:
    GOOD = Request(id="a", model="m", body=b"{}")

    def check(self, **changes):
        servable.check(
            msgspec.structs.replace(self.GOOD, **changes),
            body_bytes=100,
            reply_root="hg:{default}:results:",
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"id": "two words"}, "field 'id' is 'two words', wanted 1 to 128 letters"),
            ({"id": "{tag}"}, "field 'id'"),
            ({"path": "/admin"}, "field 'path' is '/admin', wanted /v1/chat/completions or"),
            ({"body": b"x" * 101}, "field 'body' is 101 bytes long, wanted at most 100"),
            ({"reply_to": "hg:{default}:leader"}, "field 'reply_to'"),
            ({"ttft_s": -0.5}, "field 'ttft_ms' is '-500', wanted more than 0"),
            ({"deadline_s": 0.0}, "field 'deadline_ms' is '0', wanted more than 0"),
            ({"ttft_s": float("nan")}, "field 'ttft_ms' is 'nan', wanted more than 0 and finite"),
            ({"tpot_s": float("inf")}, "field 'tpot_ms' is 'inf', wanted more than 0 and finite"),
            (
                {"deadline_at": float("nan")},
                "field 'deadline_at' is 'nan', wanted unix milliseconds",
            ),
            ({"max_attempts": 0}, "field 'max_attempts' is '0', wanted 1 to 100"),
            ({"prompt_tokens": -1}, "field 'prompt_tokens' is '-1'"),
            ({"tenant": "t" * 257}, "field 'tenant' is 257 characters long, wanted at most 256"),
            ({"blocks": ("0",) * 513}, "field 'blocks' is 513 hashes long, wanted at most 512"),
        ],
    )
    def test_each_limit_is_named(self, changes, message):
        """What no dispatcher could serve is refused by name."""
        with pytest.raises(WireError) as caught:
            self.check(**changes)

        assert message in str(caught.value)

    def test_a_good_request_passes(self):
        """The limits refuse nothing that is within them."""
        self.check(reply_to="hg:{default}:results:me", ttft_s=0.5, max_attempts=3)
