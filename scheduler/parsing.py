"""Settings from TOML text and the environment.

One walk along the Structs' own types builds the settings and, where it cannot, knows the path it stands on:
`loop.read_max is 'many', wanted int >= 1`. Nothing here knows any setting by name but the password.
"""

import difflib
import inspect
import tomllib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec

from scheduler.errors import SettingsError
from scheduler.settings import Settings

PREFIX = "HEADGATE_"


def parse(text: str, environ: Mapping[str, str]) -> Settings:
    r"""The settings that this TOML gives, overridden by `HEADGATE_…` variables.

    A variable is the path in capitals, joined by `__`; where no table's key is free (everywhere but in
    `objectives`, `fairness.weights`, `policy` and `profile`) a single `_` does as well.

    >>> parse("[loop]\nread_max = 9", {"HEADGATE_POOL": "chat"}).loop.read_max
    9
    >>> parse("", {"HEADGATE_OBJECTIVES__CHAT__TTFT_MS": "500"}).objectives["chat"].ttft_ms
    500.0

    Raises:
        SettingsError: the text is no TOML, a name is unknown, a value unusable, or a secret in the file.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"not TOML: {error}") from None
    _refuse_secrets(table)
    for path, value in _variables(environ):
        _put(table, path, value)
    built = build(table, Settings, ())
    assert isinstance(built, Settings)
    return built


def _refuse_secrets(table: Mapping[str, object]) -> None:
    redis = table.get("redis")
    if not isinstance(redis, dict):
        return
    url = redis.get("url")
    try:
        has_login = isinstance(url, str) and urlsplit(url).password is not None
    except ValueError as error:
        raise SettingsError(f"redis.url is no URL: {error}") from None
    if has_login or "password" in redis:
        where = "redis.url" if has_login else "redis.password"
        raise SettingsError(
            f"{where} holds a password in the file, wanted HEADGATE_REDIS_PASSWORD or redis.password_file"
        )


def build(value: object, wanted: object, path: tuple[str, ...]) -> object:
    """The value as the wanted type; the path is for the error's sake."""
    if get_origin(wanted) in {Union, types.UnionType}:
        wanted = _member(value, wanted, path)
    if _is_struct(wanted):
        return _build_struct(value, wanted, path)
    if get_origin(wanted) is dict:
        inner = get_args(wanted)[1]
        return {name: build(v, inner, (*path, name)) for name, v in _table(value, path).items()}
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        raise SettingsError(f"{_dotted(path)} is {value!r}, wanted {_type_name(wanted)}") from None


def _build_struct(value: object, wanted: type[msgspec.Struct], path: tuple[str, ...]) -> object:
    hints = _hints(wanted)
    tag_field = wanted.__struct_config__.tag_field
    parts = {name: part for name, part in _table(value, path).items() if name != tag_field}
    for name in parts:
        if name not in hints:
            raise SettingsError(f"{_dotted((*path, name))} is not a setting{_nearest(name, hints)}")
    built = {name: build(part, hints[name], (*path, name)) for name, part in parts.items()}
    try:
        return wanted(**built)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{_dotted(path)}: {error}") from None


def _member(value: object, union: object, path: tuple[str, ...]) -> object:
    """The one Struct of a union that the value's tag names; the union itself where it holds plain types."""
    tags = {
        member.__struct_config__.tag: member for member in get_args(union) if _is_struct(member)
    }
    if not tags:
        return union
    if None in tags:
        return tags[None]
    field = next(iter(tags.values())).__struct_config__.tag_field or "type"
    tag = _table(value, path).get(field)
    if tag not in tags:
        names = " or ".join(repr(name) for name in tags)
        raise SettingsError(f"{_dotted((*path, field))} is {tag!r}, wanted {names}")
    return tags[tag]


def _table(value: object, path: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise SettingsError(f"{_dotted(path)} is {value!r}, wanted a table")
    return value


def _variables(environ: Mapping[str, str]) -> Iterable[tuple[tuple[str, ...], object]]:
    """Path and value of each variable that is a setting, in the order of their names.

    An unknown name with a single `_` is left alone: Kubernetes sets HEADGATE_SERVICE_HOST and its like for a
    Service of our name, and for one called headgate-door HEADGATE_DOOR_PORT to `tcp://…`, which is no port. One with
    `__` can only be meant for us, and is checked like a line of the file.
    """
    known = {"_".join(path).upper(): path for path in _paths(Settings)}
    for name in sorted(environ):
        rest = name.removeprefix(PREFIX)
        if rest == name:
            continue
        if "__" in rest:
            path = tuple(part.lower() for part in rest.split("__"))
        elif rest in known and not (rest.endswith("_PORT") and "://" in environ[name]):
            path = known[rest]
        else:
            continue
        yield path, _from_text(environ[name], _type_at(Settings, path))


def _paths(of: type[msgspec.Struct]) -> Iterable[tuple[str, ...]]:
    for name, wanted in _hints(of).items():
        if _is_struct(wanted):
            yield from ((name, *rest) for rest in _paths(wanted))
        elif get_origin(wanted) is not dict:
            yield (name,)


def _type_at(wanted: object, path: tuple[str, ...]) -> object:
    """The type of the setting at this path; `object` where there is none, for `build` to complain about."""
    for name in path:
        if _is_struct(wanted):
            wanted = _hints(wanted).get(name, object)
        elif get_origin(wanted) is dict:
            wanted = get_args(wanted)[1]
        else:
            return object
    return wanted


def _from_text(text: str, wanted: object) -> object:
    """A variable's text as the wanted type, else as a TOML value, else as it stands."""
    if wanted is not object:
        try:
            return msgspec.convert(text, wanted, strict=False)
        except (msgspec.ValidationError, TypeError):
            pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(table: dict[str, object], path: tuple[str, ...], value: object) -> None:
    for depth, name in enumerate(path[:-1], start=1):
        table = _table(table.setdefault(name, {}), path[:depth])
    table[path[-1]] = value


def _hints(of: type[msgspec.Struct]) -> dict[str, object]:
    return {
        name: wanted
        for name, wanted in get_type_hints(of, include_extras=True).items()
        if name in of.__struct_fields__
    }


def _is_struct(wanted: object) -> TypeGuard[type[msgspec.Struct]]:
    return inspect.isclass(wanted) and issubclass(wanted, msgspec.Struct)


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "settings"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _type_name(wanted: object) -> str:
    """A type as a person says it: `int >= 1`, `number > 0 or nothing`."""
    if get_origin(wanted) in {Union, types.UnionType}:
        return " or ".join(_type_name(member) for member in get_args(wanted))
    if get_origin(wanted) is Literal:
        return " or ".join(repr(choice) for choice in get_args(wanted))
    if get_origin(wanted) is not Annotated:
        name = getattr(wanted, "__name__", str(wanted))
        return {"float": "number", "str": "text", "NoneType": "nothing"}.get(name, name)
    base, meta = get_args(wanted)[:2]
    bounds = {">=": meta.ge, ">": meta.gt, "<=": meta.le, "<": meta.lt}
    limits = " and".join(
        f" {sign} {bound:g}" for sign, bound in bounds.items() if bound is not None
    )
    return _type_name(base) + limits
