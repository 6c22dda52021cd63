"""`headgate dead`: what could not be served, and how it comes back."""

from typing import Annotated, Literal

import typer
from rich.table import Table

from dispatcher.cli import output
from dispatcher.client import Client
from dispatcher.streams import producer
from dispatcher.streams.connection import Entry
from dispatcher.streams.pages import whole
from scheduler import codec
from scheduler.errors import SettingsError
from scheduler.settings import Settings
from scheduler.wire.dispatcher import Dead

app = typer.Typer()


@app.command()
async def dead(
    settings: Settings,
    action: Annotated[
        Literal["list", "show", "requeue"], typer.Argument(help="What to do.")
    ] = "list",
    which: Annotated[
        str, typer.Argument(metavar="[ID]", help="A request's id or an entry of the dead.")
    ] = "",
    *,
    everything: Annotated[bool, typer.Option("--all", help="With requeue.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line an entry.")] = False,
) -> None:
    """List, show or requeue what could not be served."""
    if action != "list" and bool(which) == (everything and action == "requeue"):
        raise SettingsError(f"dead {action} wants one ID" + " or --all" * (action == "requeue"))
    async with Client.from_settings(settings) as client:
        entries = await whole(client.connection, client.keys.dead)
        if which:
            entries = [entry for entry in entries if which in (entry[0], _id(entry))]
            if not entries:
                raise SettingsError(f"{which!r} is not among the dead of {client.keys.root}")
        match action:
            case "list" if not as_json:
                _table(entries)
            case "requeue":
                await _requeue(client, entries)
            case _:
                _show(entries, as_json=as_json)


async def _requeue(client: Client, entries: list[Entry]) -> None:
    refused = 0
    for entry, fields in entries:
        own = {n.decode(): v for n, v in fields.items() if not n.startswith(b"dead_")}
        request_id = own.get("id", b"").decode(errors="replace")
        if request_id:
            call = producer.requeue(client.keys, entry, request_id, own)
            reply = await client.connection.call(call.function, call.keys, call.args)
        else:
            reply = 0
        if isinstance(reply, int):
            refused += 1
            why = "a request of that id lives" if reply else "it has no id or is gone"
            output.talk(f"{output.shown(request_id) or entry}: not requeued, {why}")
        else:
            typer.echo(output.shown(request_id))
    if refused:
        raise typer.Exit(1)


def _id(entry: Entry) -> str:
    return entry[1].get(b"id", b"").decode(errors="replace")


def _text(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(errors="replace"): v.decode(errors="replace") for name, v in fields.items()}


def _show(entries: list[Entry], *, as_json: bool) -> None:
    for entry, fields in entries:
        if as_json:
            output.json_line({"entry": entry} | _text(fields))
            continue
        typer.echo(f"entry {entry}")
        for name, value in _text(fields).items():
            if value:
                typer.echo(output.shown(f"  {name} {value}"))


def _table(entries: list[Entry]) -> None:
    table = Table("entry", "id", "outcome", "reason", box=None)
    for entry in entries:
        letter = codec.decode(Dead, entry[1])
        table.add_row(entry[0], _id(entry), letter.dead_outcome, letter.dead_reason)
    output.console().print(table)
