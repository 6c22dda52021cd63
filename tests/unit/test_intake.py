"""What is read of workers: what no core could count with is set aside, not handed on."""

import pytest

from dispatcher.intake import Intake, Unreadable
from scheduler import codec
from scheduler.keys import Keys
from scheduler.wire.worker import Beat

KEYS = Keys()
INTAKE = Intake(KEYS, body_bytes=100)


def beat(**said: str) -> dict[bytes, bytes]:
    fields = codec.encode(Beat(endpoint="a100-0", epoch=1)) | said
    return {name.encode(): str(value).encode() for name, value in fields.items()}


class TestFacts:
    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            ({"kv_tokens": "-1"}, "field 'kv_tokens' is -1, wanted 0 or more"),
            ({"step_ms": "-5"}, "field 'step_ms' is -5, wanted 0 or more"),
            ({"link_gbps": "-2.5"}, "field 'link_gbps' is -2.5, wanted 0 or more"),
            ({"endpoint": "a b"}, "field 'endpoint' is 'a b', wanted 1 to 128 characters"),
            ({"endpoint": "a=b"}, "field 'endpoint' is 'a=b', wanted 1 to 128 characters"),
        ],
    )
    def test_no_amount_is_below_nothing_and_no_name_is_two_words(self, said, reason):
        """Less room than none once ended every dispatcher that read of it."""
        fact = INTAKE.fact(KEYS.beats, ("1-0", beat(**said)))

        assert isinstance(fact, Unreadable)
        assert fact.reason.startswith(reason)

    @pytest.mark.parametrize(
        ("action", "field"), [("cancel", "id"), ("drain", "endpoint"), ("resume", "endpoint")]
    )
    def test_a_control_says_for_whom(self, action, field):
        """One by hand that names nobody would change nothing, and nobody would be told."""
        fact = INTAKE.fact(KEYS.controls, ("1-0", {b"action": action.encode()}))

        assert isinstance(fact, Unreadable)
        assert fact.reason == f"field {field!r} is missing, wanted whom to {action}"

    def test_an_attempt_ends_in_a_word_that_is_counted(self):
        """Any other would be a label of its own in every metric of outcomes."""
        said = {b"id": b"r", b"endpoint": b"e", b"epoch": b"1", b"attempt": b"1"}

        ends = [
            INTAKE.fact(KEYS.rewards, ("1-0", said | {b"outcome": word}))
            for word in (b"frob", b"returned")
        ]

        assert isinstance(ends[0], Unreadable)
        assert ends[0].reason.startswith("field 'outcome' is 'frob', wanted one of completed, ")
        assert not isinstance(ends[1], Unreadable)

    def test_a_name_may_be_a_profiles(self):
        """Emulated engines are called by theirs."""
        fact = INTAKE.fact(KEYS.beats, ("1-0", beat(endpoint="h100-80g|llama-3.1-8b|tp1-0")))

        assert fact == Beat(endpoint="h100-80g|llama-3.1-8b|tp1-0", epoch=1)
