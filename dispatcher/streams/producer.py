"""A client's moves: enqueue once, cancel, bring the dead back. Each builds one `Call`; nothing here waits."""

from collections.abc import Mapping

import msgspec

from dispatcher.streams.connection import Call, Value
from scheduler import codec
from scheduler.keys import Keys
from scheduler.settings import LimitSettings
from scheduler.wire.client import Control, Request

NOTHING = b""
"No fields at all, as a function takes them."

_ENCODER = msgspec.msgpack.Encoder()

NEVER = "+inf"
"The score of a request without a deadline in the sorted set `waiting`."


def submit(
    keys: Keys,
    request: Request,
    *,
    now: float,
    waiting_max: int,
    body_ttl_s: float,
    inline_bytes: int = LimitSettings().inline_bytes,
) -> Call:
    """Enqueue the request unless its id exists; a body above `inline_bytes` lies at `body:<id>`.

    The reply is `[1, entry]` when enqueued, `[0, entry]` when the id exists already, `[-1, waiting]` when
    `waiting_max` (0: no limit) already wait.
    """
    claim = request.body if len(request.body) > inline_bytes else b""
    names = (keys.request(request.id), keys.requests, keys.body(request.id), keys.waiting)
    deadline_at = request.deadline_at
    if request.deadline_s is not None:
        deadline_at = min(deadline_at or float("inf"), now + request.deadline_s)
    return Call(
        "submit",
        names,
        (
            request.id,
            waiting_max,
            milliseconds(body_ttl_s),
            claim,
            score(deadline_at),
            packed(msgspec.structs.replace(request, body=b"") if claim else request),
        ),
    )


def cancel(keys: Keys, request_id: str, *, reason: str = "") -> Call:
    """Set the tombstone and tell the dispatcher. The reply is 1; 0: already terminal; -1: unknown."""
    control = Control(action="cancel", id=request_id, reason=reason)
    return Call("cancel", (keys.request(request_id), keys.controls), (request_id, packed(control)))


def requeue(keys: Keys, dead_entry: str, request_id: str, fields: Mapping[str, Value]) -> Call:
    """Enqueue a dead request's own fields anew. The reply is its entry; 0: no such entry; -1: it lives."""
    names = (keys.dead, keys.request(request_id), keys.requests, keys.tokens(request_id))
    return Call("requeue", names, (dead_entry, packed_fields(fields)))


def score(deadline_at: float | None) -> str:
    """A deadline as a score in `waiting`: unix milliseconds."""
    return NEVER if deadline_at is None else codec.milliseconds(deadline_at)


def packed(message: msgspec.Struct) -> bytes:
    """A message as a function takes it: one argument, an array of name, value, ...

    Fewer arguments, not fewer bytes: redis-py spends 3 us on each, which was half a dispatcher's CPU.
    """
    try:
        # Redis' unpacker knows MessagePack's text only, not its byte strings.
        return _ENCODER.encode(codec.texts(message))
    except UnicodeDecodeError:
        return _packed_bytes(codec.encode(message))


def packed_fields(fields: Mapping[str, Value]) -> bytes:
    """The same of fields that are no message, or not only one."""
    try:
        parts = [part for pair in fields.items() for part in pair]
        return _ENCODER.encode([part.decode() if type(part) is bytes else part for part in parts])
    except UnicodeDecodeError:
        return _packed_bytes(fields)


def _packed_bytes(fields: Mapping[str, Value]) -> bytes:
    """The same for values that are no UTF-8: each as text of any bytes, which Lua's strings are."""
    parts = [part for pair in fields.items() for part in pair]
    raw = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    texts = (b"\xdb" + len(one).to_bytes(4, "big") + one for one in raw)
    return b"\xdd" + len(raw).to_bytes(4, "big") + b"".join(texts)


def milliseconds(seconds: float) -> int:
    """Seconds as a function's argument."""
    return round(seconds * 1e3)
