"""`headgate settings`: the settings in force, as a TOML file that explains itself."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import tomlkit
import typer
from tomlkit.items import Table

from scheduler.settings import RedisSettings, Settings

app = typer.Typer()

MASK = "***"
WRAP_COLUMNS = 118


@app.command()
def settings(settings: Settings) -> None:
    """Every setting as it stands here, with what it means, as TOML."""
    from dispatcher import node  # noqa: PLC0415  the core, which nothing else here needs

    core = node.core_settings(settings)
    shown = effective_toml(settings, {"policy": core.policy, "plan": core.plan})
    typer.echo(shown, nl=False)


def effective_toml(settings: Settings, tables: Mapping[str, msgspec.Struct] | None = None) -> str:
    """The settings as TOML: each field under its docstring, passwords masked.

    Reading it back gives the same settings, but for a masked password: that line is a comment, because the
    file must not hold one.

    Args:
        settings: all of them.
        tables: what the tables of the core's own mean that stand in the settings as they were written.
    """
    document = tomlkit.document()
    _fill(document, settings, tables or {})
    return tomlkit.dumps(document).lstrip("\n")


def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The string under each field of a Struct, by the field's name; fields without one are left out.

    >>> field_docs(Settings)["pool"]
    'The pool: one set of streams, one leader, one plan.'
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = inspect.cleandoc(text)
    return docs


def _fill(
    table: Table | tomlkit.TOMLDocument,
    struct: msgspec.Struct,
    tables: Mapping[str, msgspec.Struct] = MappingProxyType({}),
) -> None:
    """Plain fields first: TOML gives whatever follows a table's head to that table."""
    docs = field_docs(type(struct))
    fields = {name: getattr(struct, name) for name in struct.__struct_fields__} | dict(tables)
    config = struct.__struct_config__
    if config.tag_field:
        table.add(config.tag_field, config.tag)
    for name, value in fields.items():
        if not isinstance(value, dict | msgspec.Struct):
            table.add(tomlkit.nl())
            _explain(table, docs.get(name, ""))
            _add_plain(table, struct, name)
    for name, value in fields.items():
        if isinstance(value, dict | msgspec.Struct):
            table.add(name, _table(value, docs.get(name, "")))


def _table(value: dict[str, object] | msgspec.Struct, doc: str) -> Table:
    table = tomlkit.table()
    _explain(table, doc or inspect.getdoc(type(value)) or "")
    if isinstance(value, msgspec.Struct):
        _fill(table, value)
        return table
    for name, inner in value.items():
        if isinstance(inner, msgspec.Struct):
            table.add(name, _table(inner, ""))
        else:
            table.add(name, tomlkit.item(inner))
    return table


def _add_plain(table: Table | tomlkit.TOMLDocument, struct: msgspec.Struct, name: str) -> None:
    value = getattr(struct, name)
    if isinstance(struct, RedisSettings):
        value = {"password": MASK if struct.password else "", "url": struct.shown_url}.get(
            name, value
        )
        is_secret = name == "password" or (name == "url" and value != struct.url)
        if is_secret:
            table.add(tomlkit.comment(f"{name} = {tomlkit.item(value).as_string()}"))
            return
    if value is None:
        table.add(tomlkit.comment(f"{name} is not set"))
    else:
        table.add(name, tomlkit.item(msgspec.to_builtins(value)))


def _explain(table: Table | tomlkit.TOMLDocument, doc: str) -> None:
    for line in doc.splitlines():
        for part in textwrap.wrap(line, WRAP_COLUMNS) or [""]:
            table.add(tomlkit.comment(part))
