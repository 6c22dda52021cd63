"""One chunk of an engine's stream, as far as anybody here reads it."""

from http import HTTPStatus
from typing import Annotated

import msgspec
from msgspec import Meta

Fields = dict[str, object]

Tokens = Annotated[int, Meta(ge=0, le=10**8)]
"A count that can be one: no context is a tenth as long, and nobody should learn from what cannot be."

CHOICES_MAX = 65_536
"Choices of one answer; vLLM makes at most 16,384 a prompt."


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[Fields] | None = None


class Choice(msgspec.Struct):
    index: Annotated[int, Meta(ge=0, lt=CHOICES_MAX)] = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: Fields | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    "Of a completion; a chat's stand beside its choices."


class Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class Usage(msgspec.Struct):
    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Fields | None = None


STATUS_END = 600
"Behind the last HTTP status."


class Fault(msgspec.Struct):
    message: str | None = ""
    code: int | str | None = None

    @property
    def status(self) -> int:
        """The HTTP status of an error that it stands for; 0: none that is one."""
        try:
            status = int(self.code or 0)
        except ValueError:
            return 0
        return status if status >= HTTPStatus.BAD_REQUEST and status < STATUS_END else 0


class Times(msgspec.Struct):
    """`--enable-per-request-metrics`, in the last chunk."""

    queue_time_ms: float | None = None
    time_to_first_token_ms: float | None = None


class Chunk(msgspec.Struct):
    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Fault | str | None = None
    metrics: Times | None = None
    prompt_token_ids: list[int] | None = None


decode = msgspec.json.Decoder(Chunk).decode
"A chunk from its bytes."
