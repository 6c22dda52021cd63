"""What an engine publishes of its KV cache, in both forms that vLLM has given it.

A message is one msgpack array: moment, events, data-parallel rank. Up to vLLM 0.23 an event is an array that begins
with its name, `["BlockStored", hashes, ...]`; from 0.24 it is a map, `{"type": "BlockStored", "block_hashes": ...}`.
Fields were added at the end from version to version: what is unknown is passed over.

Told is only what a plain prompt finds: blocks on the GPU, of the first group of layers, without adapter, image or salt.
"""

from typing import Annotated

import msgspec

from scheduler.errors import UNREADABLE, WireError

Hash = int | bytes
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]

Moment = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"Seconds; an infinite one would be later than all that follow."


class BlockStored(msgspec.Struct, frozen=True):
    """These blocks can be found from now on."""

    hashes: tuple[Hash, ...]
    parent: Hash | None
    "The block before the first of them; None at the start of a text."

    token_ids: tuple[int, ...]
    block_tokens: int


class BlockRemoved(msgspec.Struct, frozen=True):
    """These no longer can."""

    hashes: tuple[Hash, ...]


class AllBlocksCleared(msgspec.Struct, frozen=True):
    """None can."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared

ORDER = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size"),
        *("lora_id", "medium", "lora_name", "extra_keys", "group_idx"),
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}
"Each event's first fields, as the older form has them."


def decode(payload: bytes) -> tuple[float, list[KvEvent]]:
    """The moment and the events of one message; of kinds not known, and of no use to a plain prompt, none.

    Raises:
        WireError: it is no such message.
    """
    try:
        moment, events, *_ = msgspec.msgpack.decode(payload, type=list[object])
        return msgspec.convert(moment, Moment), [
            event for raw in msgspec.convert(events, list[object]) if (event := _event(raw))
        ]
    except (*UNREADABLE, ValueError) as error:
        raise WireError(f"KV events cannot be read: {error}") from None


def _event(raw: object) -> KvEvent | None:
    fields = _fields(raw)
    if fields.get("medium") not in (None, "GPU") or fields.get("group_idx") not in (None, 0):
        return None
    match fields.get("type"):
        case "BlockStored" if not _is_plain(fields):
            return None
        case "BlockStored":
            return BlockStored(
                hashes=_hashes(fields["block_hashes"]),
                parent=msgspec.convert(fields.get("parent_block_hash"), Hash | None),
                token_ids=msgspec.convert(fields["token_ids"], tuple[Token, ...]),
                block_tokens=msgspec.convert(fields["block_size"], int),
            )
        case "BlockRemoved":
            return BlockRemoved(_hashes(fields["block_hashes"]))
        case "AllBlocksCleared":
            return AllBlocksCleared()
    return None


def _is_plain(fields: dict[str, object]) -> bool:
    keys = msgspec.convert(fields.get("extra_keys"), list[object] | None)
    return fields.get("lora_id") is None and not fields.get("lora_name") and not any(keys or ())


def _fields(raw: object) -> dict[str, object]:
    """The event by the names of its fields, whichever form it has."""
    if isinstance(raw, dict):
        return raw | {name: raw.get(name) for name in ORDER.get(str(raw.get("type")), ())}
    kind, *values = msgspec.convert(raw, list[object])
    names = ORDER.get(str(kind), ())
    padded = [*values, *[None] * (len(names) - len(values))]
    return {"type": kind, **dict(zip(names, padded, strict=False))}


def _hashes(raw: object) -> tuple[Hash, ...]:
    return msgspec.convert(raw, tuple[Hash, ...])
