"""`headgate dispatcher`: one process that leads its pool or stands by to."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dispatcher import local, node
from dispatcher.cli import output
from dispatcher.node import Node
from dispatcher.streams.connection import Connection, Where
from scheduler.settings import Settings

app = typer.Typer()


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The line that says a dispatcher runs."""

    event: str = "ready"
    role: str = "dispatcher"
    node: str
    pool: str
    metrics_port: int


@app.command()
async def dispatcher(
    settings: Settings,
    name: Annotated[
        str,
        typer.Option(
            "--node", metavar="NAME", help="This process's own name; default: host and process id."
        ),
    ] = "",
    *,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="For /healthz, /readyz, /metrics; 0: a free one.")
    ] = 0,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the ready line as well.")
    ] = None,
) -> None:
    """Dispatch a pool's requests to its endpoints; a second process stands by.

    Prints one line of JSON when it runs. SIGTERM: resigns at once and exits 0.
    """
    where = Where.of(settings.redis, url=local.known_url(settings.redis))
    connection = await Connection.connect(where)
    try:
        own = name or node.own_name()
        one = Node(connection, settings, name=own)
        async with one.pages.served(metrics_port) as port:
            running = _ended_by_signals(one)  # before it says so: who is ready may be told to end
            output.ready(Ready(node=own, pool=settings.pool, metrics_port=port), ready_file)
            await _ended(running)
    finally:
        await connection.close()


def _ended_by_signals(one: Node) -> "asyncio.Future[None]":
    """The node's run, which SIGTERM and SIGINT cancel."""
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(one.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    return running


async def _ended(running: "asyncio.Future[None]") -> None:
    """Return when it was told to end; raise what it fails with."""
    try:
        await running
    except asyncio.CancelledError:
        if not running.cancelled():
            raise
