"""What a body says about itself: its model, its prompt, whether it streams. The dispatcher never reads it."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from scheduler.errors import UNREADABLE, WireError
from scheduler.prefix import TEXT_BYTES

Prompt = str | list[int]
"Text, counted by estimate, or token ids, counted exactly."

Tokenizer = Callable[[str], Sequence[int]]
"Text to token ids, for who wants the count exact; the estimate is 4 bytes a token."

MEDIA = (
    *("image_url", "image_embeds", "image_pil"),
    *("audio_url", "audio_embeds", "input_audio", "video_url", "file"),
)
"Under which names a message's part holds what is no text, as vLLM reads them."

MEDIA_TOKENS = 1024
"""What one of them becomes in the prompt, by guess: 576 for a picture in LLaVA 1.5, 1,369 for a megapixel in Qwen2.5-VL.

Its bytes say nothing of that: a photograph of 3 MB would count as a million tokens.
"""

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
    except UNREADABLE as error:
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
    equal, which is what prefix hashes need. A picture or a sound is its digest, over and over, `MEDIA_TOKENS` long,
    and no tokenizer is asked how long what holds one is.
    """
    given = body.get("prompt", "")
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        given = given[0]  # several prompts in one body: the first stands for all
    if isinstance(given, list):
        return [token & 0xFFFFFFFF for token in given if isinstance(token, int)]
    text = str(given) if given else _chat(body)
    # A lone surrogate is legal JSON and no UTF-8; it must not cost the request.
    text = text.encode(errors="replace").decode()
    return text if tokenizer is None or _shows(body) else list(tokenizer(text))


def length(prompt: Prompt) -> int:
    """Tokens of a prompt, at least 1.

    >>> length("the river rises"), length([1, 2, 3])
    (4, 3)
    """
    size = -(-len(prompt.encode()) // TEXT_BYTES) if isinstance(prompt, str) else len(prompt)
    return max(1, size)


def _chat(body: dict[str, Any]) -> str:
    parts = [_words(body["tools"])] if body.get("tools") else []
    for message in _messages(body):
        called = message.get("tool_calls")
        parts.append(f"<{message.get('role', '')}>{_words(_said(message.get('content')))}")
        parts += [_words(called)] if called else []
    return "\n".join(parts)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are some; what is wrong with the others the engine says."""
    found = body.get("messages")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _shows(body: dict[str, Any]) -> bool:
    """Whether a message holds what is no text."""
    contents = [message.get("content") for message in _messages(body)]
    return any(isinstance(c, list) and any(map(_is_media, c)) for c in contents)


def _said(content: object) -> object:
    """A message's content with a stand-in for each part that is no text."""
    if not isinstance(content, list):
        return content
    return [_stand_in(part) if _is_media(part) else part for part in content]


def _is_media(part: object) -> bool:
    return isinstance(part, dict) and any(name in part for name in MEDIA)


def _stand_in(part: object) -> str:
    digest = hashlib.sha256(_words(part).encode(errors="replace")).hexdigest()
    return digest * (MEDIA_TOKENS * TEXT_BYTES // len(digest))


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
