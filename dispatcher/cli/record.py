"""`headgate record`: what a pool's streams hold, as a file to keep, pass on and ask."""

from pathlib import Path
from typing import Annotated

import typer

from dispatcher import node
from dispatcher.cli import download, output, recordings
from dispatcher.client import Client
from scheduler.settings import LONG_S, Settings

app = typer.Typer()


@app.command()
async def record(
    settings: Settings,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    *,
    last: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0, max=LONG_S, help="Only so far back; else all there is."
        ),
    ] = None,
) -> None:
    """Copy a pool's streams into a recording, to ask later what others would have done.

    Bodies stay out. `replay --policy` and `evaluate` read it.
    """
    async with Client.from_settings(settings) as client:
        since = 0.0 if last is None else client.connection.now() - last
        count = 0
        with download.replacing(out) as file:
            told = recordings.copied(
                client.connection, client.keys, node.core_settings(settings), since=since
            )
            async for line in told:
                file.write(line)
                count += 1
    output.talk(f"{count} lines of pool {settings.pool} in {out}")
