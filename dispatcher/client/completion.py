"""What a request came to: its terminal record as an answer, or as the error it is."""

from typing import Any

import msgspec

from scheduler.errors import OutcomeError
from scheduler.wire.worker import Result

_ERRORS = {kind.outcome: kind for kind in OutcomeError.__subclasses__()}


class Completion(msgspec.Struct, frozen=True):
    """A completed request's answer. What Headgate knows of it stands in `record`."""

    record: Result
    "The terminal record: endpoint, attempt, moments, tokens."

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI response, parsed."""
        parsed = msgspec.json.decode(self.record.body or b"{}")
        return parsed if isinstance(parsed, dict) else {}

    @property
    def text(self) -> str:
        """The first choice's text; empty where the answer is no text (tool calls: see `body`)."""
        choices = self.body.get("choices") or [{}]
        message = choices[0].get("message") or {}
        return str(message.get("content") or choices[0].get("text") or "")

    @property
    def usage(self) -> dict[str, Any]:
        """The engine's own count of tokens, as OpenAI names it."""
        return self.body.get("usage") or {
            "prompt_tokens": self.record.prompt_tokens,
            "completion_tokens": self.record.output_tokens,
            "total_tokens": self.record.prompt_tokens + self.record.output_tokens,
        }

    @property
    def endpoint(self) -> str:
        return self.record.endpoint

    @property
    def ttft_s(self) -> float | None:
        """From the enqueue to the first token."""
        return self.record.ttft_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds a token after the first; None below two tokens."""
        return self.record.tpot_s

    @property
    def on_time(self) -> bool | None:
        """Whether every promise was kept; None where none was made."""
        return self.record.on_time


def completion(record: Result) -> Completion:
    """The answer in a terminal record.

    Raises:
        OutcomeError: it ended other than `completed`; the type says how.
    """
    if record.outcome == "completed":
        return Completion(record)
    reason = record.reason or "no reason given"
    raise _ERRORS[record.outcome](record.id, reason, retry_after_s=record.retry_after_s)
