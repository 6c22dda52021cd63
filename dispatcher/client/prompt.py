"""What a body says about itself: its model, its prompt, whether it streams. The dispatcher never reads it."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from scheduler.errors import WireError
from scheduler.prefix import TEXT_BYTES

Prompt = str | list[int]
"Text, counted by estimate, or token ids, counted exactly."

Tokenizer = Callable[[str], Sequence[int]]
"Text to token ids, for who wants the count exact; the estimate is 4 bytes a token."

Body = dict[str, Any] | bytes


def parsed(body: Body) -> dict[str, Any]:
    """The body as an object.

    Raises:
        WireError: it is no JSON object.
    """
    if not isinstance(body, bytes):
        return body
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"field 'body' is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise WireError(
            f"field 'body' is a JSON {type(found).__name__}, wanted an object as OpenAI defines it"
        )
    return found


def encoded(body: Body) -> bytes:
    """The body as it travels; bytes are never touched.

    Raises:
        WireError: it holds what JSON cannot say.
    """
    if isinstance(body, bytes):
        return body
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"field 'body' cannot be written as JSON: {error}") from None


def prompt(body: dict[str, Any], tokenizer: Tokenizer | None = None) -> Prompt:
    """All that the engine will read, as one text or one list of token ids.

    A chat is its tools and messages in a fixed template: not the engine's own, but equal where the engine's is
    equal, which is what prefix hashes need.
    """
    given = body.get("prompt", "")
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        given = given[0]  # several prompts in one body: the first stands for all
    if isinstance(given, list):
        return [token & 0xFFFFFFFF for token in given if isinstance(token, int)]
    text = str(given) if given else _chat(body)
    # A lone surrogate is legal JSON and no UTF-8; it must not cost the request.
    text = text.encode(errors="replace").decode()
    return text if tokenizer is None else list(tokenizer(text))


def length(prompt: Prompt) -> int:
    """Tokens of a prompt, at least 1.

    >>> length("the river rises"), length([1, 2, 3])
    (4, 3)
    """
    size = -(-len(prompt.encode()) // TEXT_BYTES) if isinstance(prompt, str) else len(prompt)
    return max(1, size)


def _chat(body: dict[str, Any]) -> str:
    parts = [_words(body["tools"])] if body.get("tools") else []
    for message in body.get("messages") or ():
        if isinstance(message, dict):
            called = message.get("tool_calls")
            parts.append(f"<{message.get('role', '')}>{_words(message.get('content'))}")
            parts += [_words(called)] if called else []
    return "\n".join(parts)


def _words(content: object) -> str:
    """Text as it is; a list of parts or calls as JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    try:
        return msgspec.json.encode(content).decode()
    except (TypeError, ValueError, RecursionError):  # a lone surrogate, or what `encoded` refuses
        return repr(content)
