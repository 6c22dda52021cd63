"""Structs to flat text fields and back: what makes every entry readable in redis-cli.

A field's name tells its unit. `ttft_s` in the code (seconds) is `ttft_ms` on the wire, `finished_at` (unix
seconds) is `finished_at` in unix milliseconds. Absent is the empty string, and we write every field of a message
always, in the same order: Redis packs entries of constant shape smallest (156 B against 258 B of JSON).
"""

import contextlib
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from scheduler.errors import WireError

M = TypeVar("M", bound=msgspec.Struct)

INT_DIGITS = 20
"Enough for 64 bits and a sign."

_KEPT = "extra"
"The one field that is not on the wire itself: it holds the fields we do not know."


def encode(message: msgspec.Struct) -> dict[str, str | bytes]:
    """The message as flat fields, all of them, in the order of its class; then the unknown ones it kept."""
    plan = _plan(type(message))
    fields = dict(zip(plan.wire_names, _written(plan.writers, plan, message), strict=True))
    return {**fields, **getattr(message, _KEPT)} if plan.keeps_unknown else fields


def texts(message: msgspec.Struct) -> list[str]:
    """The same in one list of text: name, value, name, value, ...

    Raises:
        UnicodeDecodeError: a value is bytes that are no UTF-8.
    """
    plan = _plan(type(message))
    parts = plan.blank.copy()
    parts[1::2] = _written(plan.text_writers, plan, message)
    if plan.keeps_unknown:
        for pair in getattr(message, _KEPT).items():
            parts += pair
    return parts


def _written(writers: tuple["_Write", ...], plan: "_Plan", message: msgspec.Struct) -> list[Any]:
    """A message's values as they are written, in the order of its class."""
    return [
        "" if value is None else value if write is None else write(value)
        for write, value in zip(writers, plan.values(message), strict=True)
    ]


def decode(cls: type[M], fields: Mapping[bytes, bytes]) -> M:
    """The message that these fields are; empty and missing fields take the class's default.

    Unknown fields are kept in `extra` where the class has one, and ignored where it has not.

    Raises:
        WireError: a value cannot be read, or a field without default is missing; names the field, the value
            found and the value wanted.
    """
    plan = _plan(cls)
    readers = plan.readers
    values: dict[str, Any] = {}
    for key, raw in fields.items():  # by what is there: of a message many fields are empty
        if raw and (row := readers.get(key)) is not None:
            name, read = row
            try:
                values[name] = read(raw)
            except ValueError as error:
                shown = raw[:40].decode(errors="replace")
                raise WireError(f"field {key.decode()!r} is {shown!r}, wanted {error}") from None
    if not plan.required.keys() <= values.keys():
        name = next(name for name in plan.required if name not in values)
        wanted = plan.required[name]
        raise WireError(f"field {wire_name(name)!r} is missing, wanted {wanted}")
    if plan.keeps_unknown and not fields.keys() <= readers.keys():
        values[_KEPT] = {
            key.decode(errors="replace"): raw.decode(errors="replace")
            for key, raw in fields.items()
            if key not in readers
        }
    return cls(**values)


def readable(cls: type[M], entries: Iterable[tuple[str, Mapping[bytes, bytes]]]) -> list[M]:
    """The messages of these entries, pairs of id and fields; what cannot be read is left out."""
    found = []
    for _, fields in entries:
        with contextlib.suppress(WireError):
            found.append(decode(cls, fields))
    return found


def wire_name(field: str) -> str:
    """How a field is called on the wire.

    >>> wire_name("ttft_s"), wire_name("enqueued_at"), wire_name("model")
    ('ttft_ms', 'enqueued_at', 'model')
    """
    return field[:-2] + "_ms" if field.endswith("_s") else field


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds a person writes: no exponent, no trailing zeros, microseconds kept.

    >>> milliseconds(0.012), milliseconds(0.00025), milliseconds(-0.0015), milliseconds(1731500000.123)
    ('12', '0.25', '-1.5', '1731500000123')
    """
    value = seconds * 1e3
    whole = int(value)
    return str(whole) if whole == value else f"{value:.3f}".rstrip("0").rstrip(".")


_Write = Callable[[Any], str | bytes] | None
"How to write a value that is there; None: it is text or bytes already."


class _Plan(NamedTuple):
    """How one class crosses the wire, made out once."""

    wire_names: tuple[str, ...]
    values: Callable[[Any], tuple[Any, ...]]
    "A message's values in the same order."
    writers: tuple[_Write, ...]
    text_writers: tuple[_Write, ...]
    "The same where all must be text."
    blank: list[str]
    "A message in which every value is empty: name, value, name, value, ..."
    readers: dict[bytes, tuple[str, Callable[[bytes], Any]]]
    "By its name on the wire: the field's own and how to read it."
    required: dict[str, str]
    "Which must be there, and what is wanted of each."
    keeps_unknown: bool


@cache
def _plan(cls: type[msgspec.Struct]) -> _Plan:
    hints = get_type_hints(cls)
    names = tuple(name for name in cls.__struct_fields__ if name != _KEPT)
    kinds = {name: _bare(hints[name]) for name in names}
    ways = {name: _way(name, kind) for name, kind in kinds.items()}
    required = {field.name for field in msgspec.structs.fields(cls) if field.required}
    return _Plan(
        wire_names=tuple(wire_name(name) for name in names),
        values=attrgetter(*names) if len(names) > 1 else lambda m: (getattr(m, names[0]),),
        writers=tuple(ways[name][0] for name in names),
        text_writers=tuple(
            bytes.decode if kinds[name] is bytes else ways[name][0] for name in names
        ),
        blank=[part for name in names for part in (wire_name(name), "")],
        readers={wire_name(name).encode(): (name, ways[name][1]) for name in names},
        required={name: _WANTED.get(kinds[name], "text") for name in names if name in required},
        keeps_unknown=_KEPT in cls.__struct_fields__,
    )


def _way(name: str, kind: Any) -> tuple[_Write, Callable[[bytes], Any]]:
    """How to write and to read a field of this name and type."""
    if kind is float:
        return _numbers(name)
    return _choice(kind) or _KINDS[kind]


def _bare(hint: Any) -> Any:
    """The type without its `| None`, and `tuple` for any tuple; a `Literal` stays as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not type(None))
    return hint if get_origin(hint) is Literal else get_origin(hint) or hint


def _choice(kind: Any) -> tuple[None, Callable[[bytes], str]] | None:
    """How to write and read one of a few words; None where the type is no `Literal`."""
    if get_origin(kind) is not Literal:
        return None
    words: dict[bytes, str] = {word.encode(): word for word in get_args(kind)}

    def read(raw: bytes) -> str:
        word = words.get(raw)
        if word is None:
            raise ValueError(f"one of {', '.join(words.values())}")
        return word

    return None, read


def _numbers(name: str) -> tuple[Callable[[Any], str], Callable[[bytes], Any]]:
    if name == "at" or name.endswith(("_s", "_at")):
        return milliseconds, _read_ms
    return _write_float, _read_float


def _read_ms(raw: bytes) -> float:
    try:
        value = float(raw) / 1e3
    except ValueError:
        raise ValueError("milliseconds, a number") from None
    if not -1e15 < value < 1e15:  # also refuses nan and the infinities
        raise ValueError("milliseconds, a finite number below 1e18")
    return value


def _write_float(value: float) -> str:
    return format(value, ".6g")


def _read_float(raw: bytes) -> float:
    try:
        value = float(raw)
    except ValueError:
        raise ValueError("a number") from None
    if not -1e300 < value < 1e300:
        raise ValueError("a finite number below 1e300")
    return value


def _read_int(raw: bytes) -> int:
    # Python's int has no bound of its own, and turns some 4,300 digits into a traceback.
    try:
        if len(raw) <= INT_DIGITS:
            return int(raw)
    except ValueError:
        pass
    raise ValueError(f"a whole number of at most {INT_DIGITS} digits")


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


_KINDS: dict[Any, tuple[_Write, Callable[[bytes], Any]]] = {
    str: (None, _read_text),
    bytes: (None, bytes),
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
