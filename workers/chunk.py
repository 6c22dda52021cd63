"""One chunk of an engine's stream, as far as anybody here reads it."""

import msgspec

Fields = dict[str, object]


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[Fields] | None = None


class Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: Fields | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    "Of a completion; a chat's stand beside its choices."


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Fields | None = None


class Fault(msgspec.Struct):
    message: str = ""
    code: int | str | None = None

    @property
    def status(self) -> int:
        """The HTTP status that it stands for; 0: none that can be read."""
        try:
            return int(self.code or 0)
        except ValueError:
            return 0


class Times(msgspec.Struct):
    """`--enable-per-request-metrics`, in the last chunk."""

    queue_time_ms: float | None = None
    time_to_first_token_ms: float | None = None


class Chunk(msgspec.Struct):
    id: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Fault | str | None = None
    metrics: Times | None = None
    prompt_token_ids: list[int] | None = None


decode = msgspec.json.Decoder(Chunk).decode
"A chunk from its bytes."
