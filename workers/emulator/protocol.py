"""The OpenAI bodies a client sends, what is asked for in them, and how a request is refused."""

from typing import Literal

import msgspec

from scheduler.errors import UNREADABLE
from workers.emulator.text import Context, render_chat

Kind = Literal["completion", "chat"]

COMPLETION_MAX_TOKENS = 16
"What the completions API allows when the body does not say."


class RefusedError(Exception):
    """A request that vLLM would refuse, with the status and words it would use."""

    def __init__(
        self, status: int, message: str, *, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def body(self) -> bytes:
        return error_body(self.status, str(self), kind=self.kind, param=self.param)


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Hidden(msgspec.Struct, frozen=True):
    """`vllm_xargs`: what only the emulated engine may know."""

    output_tokens: int | None = None
    "True length of the answer."


class Transfer(msgspec.Struct, frozen=True):
    """`kv_transfer_params`, as far as they are looked at."""

    do_remote_decode: bool = False
    "Keep the KV for another engine."
    do_remote_prefill: bool = False
    "Fetch it from there."
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None


class TextPart(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[TextPart] | None = None


class Body(msgspec.Struct, frozen=True):
    """Fields of both faces; others are accepted and ignored, as vLLM does."""

    model: str | None = None
    prompt: str | list[int | str | list[int]] | None = None
    messages: list[Message] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int | None = 1
    priority: int = 0
    return_token_ids: bool | None = False
    cache_salt: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    vllm_xargs: Hidden | None = None
    kv_transfer_params: Transfer | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request, understood."""

    kind: Kind
    context: Context
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    output_tokens: int | None
    priority: int
    salt: str
    is_stream: bool
    has_usage: bool
    has_running_usage: bool
    returns_ids: bool
    transfer: Transfer
    kills_engine: bool
    "It claims KV blocks of a peer without naming them: the real engine dies of it."

    def words(self) -> tuple[list[bytes], bool]:
        """The whole answer, and whether it ends by itself rather than by `max_tokens`."""
        if self.output_tokens is not None:
            own = max(self.output_tokens, self.min_tokens, 1)
            return self.context.say(min(own, self.max_tokens)), own <= self.max_tokens
        if self.ignore_eos:
            return self.context.say(self.max_tokens), False
        return self.context.say_until_end(self.min_tokens, self.max_tokens)


_decoder = msgspec.json.Decoder(Body)


def understand(
    raw: bytes, kind: Kind, *, model: str, max_model_len: int, priority_header: str | None = None
) -> Ask:
    """What a body asks for.

    Raises:
        RefusedError: with vLLM's status: 400 for a bad body, 404 for an unknown model.
    """
    try:
        body = _decoder.decode(raw)
    except UNREADABLE as error:
        raise RefusedError(400, str(error), kind="Bad Request") from error
    if body.model and body.model != model:
        raise RefusedError(
            404,
            f"The model `{body.model}` does not exist. Valid aliases: {model}.",
            kind="NotFoundError",
            param="model",
        )
    if body.n not in (None, 1):
        raise RefusedError(400, f"n is {body.n}, only 1 is emulated", param="n")
    context = _chat_context(body) if kind == "chat" else _completion_context(body)
    options = body.stream_options or StreamOptions()
    if body.stream_options is not None and not body.stream:
        raise RefusedError(
            400,
            "Stream options can only be defined when `stream=True`. (parameter=stream_options)",
            param="stream_options",
        )
    transfer = body.kv_transfer_params or Transfer()
    return Ask(
        kind=kind,
        context=context,
        max_tokens=_max_tokens(body, kind, context.n_tokens, max_model_len),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        output_tokens=body.vllm_xargs.output_tokens if body.vllm_xargs else None,
        priority=_priority(body, priority_header),
        salt=body.cache_salt or "",
        is_stream=bool(body.stream),
        has_usage=options.include_usage,
        has_running_usage=options.include_usage and options.continuous_usage_stats,
        returns_ids=bool(body.return_token_ids),
        transfer=transfer,
        kills_engine=transfer.do_remote_prefill and transfer.remote_engine_id is None,
    )


def tokens(raw: bytes) -> list[int]:
    """The token ids of a prompt, as /tokenize has them.

    Raises:
        RefusedError: 400 for a bad body.
    """
    try:
        body = _decoder.decode(raw)
    except UNREADABLE as error:
        raise RefusedError(400, str(error), kind="Bad Request") from error
    return (_chat_context(body) if body.messages else _completion_context(body)).ids


def error_body(status: int, message: str, *, kind: str, param: str | None = None) -> bytes:
    """An error in vLLM's shape, as a body or as a chunk inside a stream."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}
    )


def _completion_context(body: Body) -> Context:
    prompt = body.prompt
    if prompt is None or prompt in ("", []):
        raise RefusedError(
            400,
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
            param="prompt",
        )
    if isinstance(prompt, str):
        return Context.of_text(prompt)
    try:
        return Context.of_ids(msgspec.convert(prompt, list[int]))
    except msgspec.ValidationError as error:
        raise RefusedError(
            400, "prompt is a list of prompts, only one prompt is emulated", param="prompt"
        ) from error
    except ValueError as error:
        raise RefusedError(400, str(error), param="prompt") from error


def _chat_context(body: Body) -> Context:
    if not body.messages:
        raise RefusedError(
            400,
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise RefusedError(
            400, "continue_final_message and add_generation_prompt are not compatible."
        )
    text = render_chat(
        [(message.role, _content(message)) for message in body.messages],
        opens_answer=body.add_generation_prompt,
        leaves_open=body.continue_final_message,
    )
    return Context.of_text(text)


def _content(message: Message) -> str:
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text":
                raise RefusedError(400, f"content part {part.type!r} is not emulated, only text")
        return "".join(part.text for part in message.content)
    return message.content or ""


def _max_tokens(body: Body, kind: Kind, prompt_tokens: int, max_model_len: int) -> int:
    """The limit on the output, within the context length."""
    room = max_model_len - prompt_tokens
    asked = body.max_completion_tokens if kind == "chat" else None
    asked = body.max_tokens if asked is None else asked
    if asked is None:
        asked = min(COMPLETION_MAX_TOKENS, room) if kind == "completion" else room
    if room < 0:
        raise RefusedError(
            400,
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains {prompt_tokens} input tokens, which exceeds this limit even without any "
            "output tokens. Please reduce the length of the input prompt. "
            f"(parameter=input_tokens, value={prompt_tokens})",
            param="input_tokens",
        )
    if asked > max_model_len:
        raise RefusedError(
            400,
            f"max_tokens={asked} cannot be greater than max_model_len={max_model_len}. "
            f"Please request fewer output tokens. (parameter=max_tokens, value={asked})",
            param="max_tokens",
        )
    asked = min(asked, room)  # without a word to the client
    if asked < 1:
        raise RefusedError(
            400,
            f"max_tokens must be at least 1, got {asked}. (parameter=max_tokens, value={asked})",
            param="max_tokens",
        )
    if asked < body.min_tokens:
        raise RefusedError(
            400,
            f"min_tokens must be less than or equal to max_tokens={asked}, got {body.min_tokens}.",
        )
    return asked


def _priority(body: Body, header: str | None) -> int:
    """The header wins over the body, and one that is no number is as good as none; as in vLLM."""
    try:
        return int(header) if header is not None else body.priority
    except ValueError:
        return body.priority
