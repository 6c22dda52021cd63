"""Structs to flat text fields and back: what makes every entry readable in redis-cli.

A field's name tells its unit. `ttft_s` in the code (seconds) is `ttft_ms` on the wire, `finished_at` (unix
seconds) is `finished_at` in unix milliseconds. Absent is the empty string, and we write every field of a message
always, in the same order: Redis packs entries of constant shape smallest (156 B against 258 B of JSON).
"""

import contextlib
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from scheduler.errors import WireError

M = TypeVar("M", bound=msgspec.Struct)

INT_DIGITS = 20
"Enough for 64 bits and a sign."

_KEPT = "extra"
"The one field that is not on the wire itself: it holds the fields we do not know."


def encode(message: msgspec.Struct) -> dict[str, str | bytes]:
    """The message as flat fields, all of them, in the order of its class; then the unknown ones it kept."""
    fields: dict[str, str | bytes] = {}
    for name, wire_name, write, _, _ in _plan(type(message)):
        value = getattr(message, name)
        fields[wire_name] = "" if value is None else write(value)
    fields.update(getattr(message, _KEPT, {}))
    return fields


def decode(cls: type[M], fields: Mapping[bytes, bytes]) -> M:
    """The message that these fields are; empty and missing fields take the class's default.

    Unknown fields are kept in `extra` where the class has one, and ignored where it has not.

    Raises:
        WireError: a value cannot be read, or a field without default is missing; names the field, the value
            found and the value wanted.
    """
    values: dict[str, Any] = {}
    plan = _plan(cls)
    for name, wire_name, _, read, required in plan:
        raw = fields.get(wire_name.encode())
        if raw:
            try:
                values[name] = read(raw)
            except ValueError as error:
                shown = raw[:40].decode(errors="replace")
                raise WireError(f"field {wire_name!r} is {shown!r}, wanted {error}") from None
        elif required:
            raise WireError(f"field {wire_name!r} is missing, wanted {required}")
    if _KEPT in cls.__struct_fields__:
        known = _wire_names(cls)
        values[_KEPT] = {
            key.decode(errors="replace"): value.decode(errors="replace")
            for key, value in fields.items()
            if key not in known
        }
    return cls(**values)


def wire_name(field: str) -> str:
    """How a field is called on the wire.

    >>> wire_name("ttft_s"), wire_name("enqueued_at"), wire_name("model")
    ('ttft_ms', 'enqueued_at', 'model')
    """
    return field[:-2] + "_ms" if field.endswith("_s") else field


def flat(fields: Mapping[str, str | bytes]) -> list[str | bytes]:
    """Fields and values in one list, as a function's arguments want them."""
    return [part for pair in fields.items() for part in pair]


def pairs(items: Iterable[bytes]) -> dict[bytes, bytes]:
    """The inverse of `flat`, for replies that come as one list."""
    it = iter(items)
    return dict(zip(it, it, strict=True))


def text_number(value: float) -> str:
    """A number as a person writes it: no exponent, no trailing zeros, microseconds kept.

    >>> text_number(12.0), text_number(0.25), text_number(-1.5), text_number(1731500000123.0)
    ('12', '0.25', '-1.5', '1731500000123')
    """
    whole = int(value)
    return str(whole) if whole == value else f"{value:.3f}".rstrip("0").rstrip(".")


_Plan = list[tuple[str, str, Callable[[Any], str | bytes], Callable[[bytes], Any], str]]


@cache
def _plan(cls: type[msgspec.Struct]) -> _Plan:
    """One row a field: its name, its wire name, how to write and read it, and what is wanted if it must be there."""
    hints = get_type_hints(cls)
    required = {f.name for f in msgspec.structs.fields(cls) if f.required}
    plan: _Plan = []
    for name in cls.__struct_fields__:
        if name == _KEPT:
            continue
        kind = _bare(hints[name])
        write, read = _numbers(name) if kind is float else _choice(kind) or _KINDS[kind]
        wanted = _WANTED.get(kind, "text") if name in required else ""
        plan.append((name, wire_name(name), write, read, wanted))
    return plan


@cache
def _wire_names(cls: type[msgspec.Struct]) -> frozenset[bytes]:
    return frozenset(row[1].encode() for row in _plan(cls))


def _bare(hint: Any) -> Any:
    """The type without its `| None`, and `tuple` for any tuple; a `Literal` stays as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    return hint if get_origin(hint) is Literal else get_origin(hint) or hint


def _choice(kind: Any) -> tuple[Callable[[Any], str], Callable[[bytes], str]] | None:
    """How to write and read one of a few words; None where the type is no `Literal`."""
    if get_origin(kind) is not Literal:
        return None
    words = get_args(kind)

    def read(raw: bytes) -> str:
        word = _read_text(raw)
        if word not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return word

    return str, read


def _numbers(name: str) -> tuple[Callable[[Any], str], Callable[[bytes], Any]]:
    if name == "at" or name.endswith(("_s", "_at")):
        return _write_ms, _read_ms
    return _write_float, _read_float


def _write_ms(value: float) -> str:
    return text_number(value * 1e3)


def _read_ms(raw: bytes) -> float:
    try:
        value = float(raw) / 1e3
    except ValueError:
        raise ValueError("milliseconds, a number") from None
    if not -1e15 < value < 1e15:  # also refuses nan and the infinities
        raise ValueError("milliseconds, a finite number")
    return value


def _write_float(value: float) -> str:
    return format(value, ".6g")


def _read_float(raw: bytes) -> float:
    try:
        value = float(raw)
    except ValueError:
        raise ValueError("a number") from None
    if not -1e300 < value < 1e300:
        raise ValueError("a finite number")
    return value


def _read_int(raw: bytes) -> int:
    # Python's int has no bound of its own, and turns some 4,300 digits into a traceback.
    if len(raw) <= INT_DIGITS:
        with contextlib.suppress(ValueError):
            return int(raw)
    raise ValueError("a whole number")


def _read_bool(raw: bytes) -> bool:
    word = raw.lower()
    if word in (b"1", b"true", b"yes"):
        return True
    if word in (b"0", b"false", b"no"):
        return False
    raise ValueError("1 or 0")


def _read_text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError("UTF-8 text") from None


def _read_words(raw: bytes) -> tuple[str, ...]:
    return tuple(_read_text(raw).split())


_KINDS: dict[Any, tuple[Callable[[Any], str | bytes], Callable[[bytes], Any]]] = {
    str: (str, _read_text),
    bytes: (bytes, bytes),
    int: (str, _read_int),
    bool: (lambda value: "1" if value else "0", _read_bool),
    tuple: (" ".join, _read_words),
}

_WANTED: dict[Any, str] = {
    str: "text",
    bytes: "text",
    int: "a whole number",
    float: "a number",
    bool: "1 or 0",
    tuple: "words with spaces between",
}
