"""One HTTP request, understood: what is asked for, and nothing of it changed.

The body travels on as the bytes that came. Read are the few fields that decide how it is carried; the worker and
the engine read the rest. `kv_transfer_params` are refused here (and dropped by the worker, whoever sent them): one
request with them can kill an engine or poison its cache, and dropping them in silence would rewrite the body.
"""

from collections.abc import Mapping

import msgspec

from dispatcher.client.wishes import Wishes
from dispatcher.door import headers as spoken
from dispatcher.door.refusal import Refusal
from scheduler.errors import UNREADABLE
from scheduler.wire.words import ID_PATTERN, PATHS

CHAT = PATHS[0]

_ABSENT = (b"", b"null", b'""', b"[]")


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Body(msgspec.Struct, frozen=True):
    """The fields that decide how a request is carried."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    kv_transfer_params: msgspec.Raw = msgspec.Raw()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for."""

    model: str
    is_chat: bool
    is_stream: bool
    has_usage: bool
    "Count the tokens in a last chunk."

    returns_ids: bool
    "Token ids were asked for; the worker asks for them in any case, for who has to go on."

    name: str
    "What the client calls it; the id in the answer. Empty: it does not say."

    outlives: bool
    "It goes on when the client goes away."

    wishes: Wishes


_decode = msgspec.json.Decoder(Body).decode


def understand(raw: bytes, path: str, headers: Mapping[str, str]) -> Ask:
    """What a body and its headers ask for.

    Raises:
        Refusal: 400, naming what was found and what is wanted.
    """
    body = _body(raw)
    _check(body, path)
    wishes = spoken.wishes(headers)
    if body.priority is not None:
        wishes.setdefault("priority", -body.priority)  # vLLM's order: lower first
    is_stream = bool(body.stream)
    options = body.stream_options
    assert body.model is not None
    wishes |= {"model": body.model, "path": path, "stream": is_stream}
    return Ask(
        model=body.model,
        is_chat=path == CHAT,
        is_stream=is_stream,
        has_usage=bool(options and options.include_usage),
        returns_ids=bool(body.return_token_ids),
        name=_name(headers),
        outlives=_outlives(headers),
        wishes=wishes,
    )


def _body(raw: bytes) -> Body:
    try:
        return _decode(raw)
    except msgspec.ValidationError as error:
        raise Refusal(400, "invalid", f"body: {error}") from None
    except UNREADABLE as error:
        raise Refusal(400, "invalid", f"body is not JSON: {error}") from None


def _check(body: Body, path: str) -> None:
    if not body.model:
        raise _missing("model", body.model, "a name from /v1/models")
    if path == CHAT:
        if bytes(body.messages) in _ABSENT or bytes(body.messages)[:1] != b"[":
            raise _missing("messages", _shown(body.messages), "a list of at least one message")
    elif bytes(body.prompt) in _ABSENT:
        raise _missing("prompt", _shown(body.prompt), "a text or token ids")
    if body.stream_options is not None and not body.stream:
        raise _missing("stream_options", "set", "none without `stream`")
    if bytes(body.kv_transfer_params) not in (*_ABSENT, b"{}"):
        raise _missing(
            "kv_transfer_params", "set", "none: handing over KV is the pool's own business"
        )


def _missing(field: str, found: object, wanted: str) -> Refusal:
    return Refusal(400, "invalid", f"field {field!r} is {found!r}, wanted {wanted}", param=field)


def _shown(raw: msgspec.Raw) -> str:
    return bytes(raw)[:40].decode(errors="replace") or "missing"


def _name(headers: Mapping[str, str]) -> str:
    """The client's own id where it can be one; any other is replaced, as every proxy does."""
    name = headers.get("x-request-id", "")
    return name if ID_PATTERN.fullmatch(name) else ""


def _outlives(headers: Mapping[str, str]) -> bool:
    said = headers.get("x-headgate-on-disconnect", "cancel")
    if said not in ("cancel", "continue"):
        raise Refusal(
            400,
            "invalid",
            f"header 'x-headgate-on-disconnect' is {said[:60]!r}, wanted cancel or continue",
            param="x-headgate-on-disconnect",
        )
    return said == "continue"
