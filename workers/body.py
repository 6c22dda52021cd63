"""What is posted to the engine: the client's body, made safe, streamed, and continued where an attempt broke off."""

import re

import msgspec

from scheduler.errors import UNREADABLE, EngineError, WireError
from scheduler.wire.dispatcher import Job
from workers import halves

CHAT = "/v1/chat/completions"

_RICH = (
    "tools",
    "functions",
    "logprobs",
    "prompt_logprobs",
    "echo",
    "use_beam_search",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
)
"Fields whose answer is more than text, or constrained from its beginning: it cannot be taken up in the middle."

_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
"Counts of output tokens, which a continued attempt has partly used."

_TRACEPARENT = re.compile(r"[0-9a-f]{2}(-[0-9a-f]+)+")
"W3C trace context. Anything else is left out, as the standard asks; a line break in a header would be an attack."

Body = dict[str, object]


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What earlier attempts left in the token log."""

    text: str = ""
    pieces: int = 0
    output_tokens: int = 0
    first_token_at: float | None = None
    "When the client saw the first of it."
    ids: tuple[int, ...] = ()
    "The tokens' ids, where the log knows them all."
    is_plain: bool = True
    "Whether it is text and nothing else."


NOTHING = Written()


class Post(msgspec.Struct, frozen=True):
    """A request as the engine gets it."""

    path: str
    data: bytes
    headers: dict[str, str]
    max_tokens: int | None
    "The most it may still say, where the client set a limit."
    is_spent: bool = False
    "There is nothing to ask: all that was allowed is said, or the prompt cannot be computed apart."


def read(raw: bytes, path: str) -> Body:
    """The client's body.

    Raises:
        WireError: it is no JSON object, or lacks what its path needs.
    """
    try:
        body = msgspec.json.decode(raw)
    except UNREADABLE as error:
        raise WireError(f"body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise WireError(f"body is a JSON {type(body).__name__}, wanted an object")
    needed = "messages" if path == CHAT else "prompt"
    if not body.get(needed):
        raise WireError(f"body has no {needed!r}, wanted for {path}")
    if path == CHAT and not isinstance(body["messages"], list):
        raise WireError(f"body's 'messages' is a {type(body['messages']).__name__}, wanted a list")
    return body


def post(job: Job, body: Body, written: Written = NOTHING, *, by_priority: bool = False) -> Post:
    """The body made ready for the engine.

    Streamed, so that the first token, the gaps and a cancellation can be seen; but for a prefill leg, as only an answer
    in one piece says where its KV is. `kv_transfer_params` from outside can kill an engine or poison its cache, and
    are dropped.

    Raises:
        EngineError: text was already written and this kind of request cannot be continued; or what a decode leg says
            of its KV is no object.
    """
    ready = {key: value for key, value in body.items() if key != halves.PARAMS}
    ready.setdefault("model", job.model)
    ready["stream"] = True
    ready["stream_options"] = {"include_usage": True, "continuous_usage_stats": job.stream}
    if by_priority:
        ready["priority"] = -job.priority  # vLLM's order is the other way round: lower first
    if job.stream and is_ids(body.get("prompt")):
        ready["return_token_ids"] = True
    is_spent = False
    if written.pieces:
        _continue(ready, job, written)
        is_spent = _reduce(ready, written.output_tokens)
    if job.leg == "prefill":
        is_spent = is_spent or bool(halves.obstacle(ready))
        halves.first(ready)
    elif job.leg == "decode":
        halves.second(ready, job.kv_params)
    headers = {"Content-Type": "application/json", "X-Request-Id": f"{job.id}-{job.attempt}"}
    if _TRACEPARENT.fullmatch(job.traceparent):
        headers["traceparent"] = job.traceparent
    return Post(job.path, msgspec.json.encode(ready), headers, max_tokens(ready), is_spent)


def max_tokens(body: Body) -> int | None:
    """The client's limit on the output, under either of its names."""
    for name in ("max_completion_tokens", "max_tokens"):
        limit = body.get(name)
        if isinstance(limit, int):
            return limit
    return None


def is_ids(prompt: object) -> bool:
    """Whether it is one prompt of token ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _continue(ready: Body, job: Job, written: Written) -> None:
    obstacle = _obstacle(ready, written)
    if obstacle:
        raise EngineError(
            f"{written.pieces} pieces were already written and cannot be continued: {obstacle}",
            retryable=False,
        )
    if job.path == CHAT:
        messages = ready["messages"]
        assert isinstance(messages, list)
        ready["messages"] = _with_answer(messages, written.text, is_open=_is_open(ready))
        ready["continue_final_message"] = True
        ready["add_generation_prompt"] = False
        return
    prompt = ready["prompt"]
    if isinstance(prompt, str):
        ready["prompt"] = prompt + written.text
    else:
        assert isinstance(prompt, list)
        ready["prompt"] = [*prompt, *written.ids]


def _obstacle(body: Body, written: Written) -> str:
    """Why the text cannot be taken up where it ends; empty where it can."""
    for name in _RICH:
        if body.get(name):
            return f"the request has {name!r}"
    count = body.get("n")
    if count not in (None, 1):
        return f"the request asks for {count} choices"
    shape = body.get("response_format")
    if isinstance(shape, dict) and shape.get("type", "text") != "text":
        return f"the request asks for {shape.get('type')!r}"
    prompt = body.get("prompt")
    if is_ids(prompt):
        return "" if written.ids else "the ids of the tokens written are unknown"
    if prompt is not None and not isinstance(prompt, str):
        return "the request has several prompts"
    return "" if written.is_plain else "more than text was written"


def _with_answer(messages: list[object], text: str, *, is_open: bool) -> list[object]:
    last = messages[-1]
    if is_open and isinstance(last, dict) and isinstance(last.get("content"), str):
        return [*messages[:-1], last | {"content": last["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]


def _is_open(body: Body) -> bool:
    """Whether the client itself had asked to continue a message of its own."""
    return bool(body.get("continue_final_message"))


def _reduce(ready: Body, used: int) -> bool:
    """Take the tokens already said off every limit; True when nothing is left to say."""
    for name in _LIMITS:
        limit = ready.get(name)
        if isinstance(limit, int):
            ready[name] = limit - used
    minimum = ready.get("min_tokens")
    if isinstance(minimum, int):
        ready["min_tokens"] = max(minimum, 0)
    hidden = ready.get("vllm_xargs")
    if isinstance(hidden, dict) and isinstance(hidden.get("output_tokens"), int):
        left = hidden["output_tokens"] - used  # the emulated engine's true length
        ready["vllm_xargs"] = hidden | {"output_tokens": left}
        if left <= 0:
            return True
    limit = max_tokens(ready)
    return limit is not None and limit <= 0
