"""`headgate door`: OpenAI's HTTP API in front of a pool; any number of doors may serve one."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dispatcher.cli import output
from dispatcher.client import Client
from dispatcher.door.keyring import Keyring
from dispatcher.door.server import Door
from scheduler.settings import Settings

app = typer.Typer()


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The line that says a door is open."""

    event: str = "ready"
    role: str = "door"
    pool: str
    url: str
    metrics_port: int
    "Where /metrics is: a port of its own, or the door's."


@app.command()
async def door(
    settings: Settings,
    *,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Where to listen; else door.host.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0: a free one; else door.port.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="A second one for /metrics; 0: only the door's own."),
    ] = None,
    drain_s: Annotated[
        float | None,
        typer.Option(min=0, help="For open requests at the end; else door.drain_s."),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the ready line as well.")
    ] = None,
) -> None:
    """Serve OpenAI's HTTP API on a pool: chat, completions, models.

    Prints one line of JSON when it is open. SIGTERM: open requests may finish, then exits 0.
    """
    said = {"host": host, "port": port, "metrics_port": metrics_port, "drain_s": drain_s}
    own = msgspec.structs.replace(
        settings.door, **{name: value for name, value in said.items() if value is not None}
    )
    settings = msgspec.structs.replace(settings, door=own)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    keyring = Keyring.from_settings(own, os.environ)
    async with contextlib.AsyncExitStack() as open_:
        client = await open_.enter_async_context(Client.from_settings(settings))
        one = Door(client, settings, keyring)
        shown = 0
        if own.metrics_port:
            shown = await open_.enter_async_context(one.pages.served(own.metrics_port))
        bound = await open_.enter_async_context(one.served())
        scheme = "https" if own.tls_cert_file else "http"
        url = f"{scheme}://{own.host}:{bound}"
        ready = Ready(pool=settings.pool, url=url, metrics_port=shown or bound)
        output.ready(ready, ready_file)
        await told.wait()
