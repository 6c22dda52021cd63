"""`headgate resume`: the inverse of `drain`."""

from typing import Annotated

import typer

from dispatcher.cli.drain import order
from dispatcher.client import Client
from scheduler.settings import Settings
from scheduler.wire.client import Control

app = typer.Typer()


@app.command()
async def resume(
    settings: Settings,
    endpoint: Annotated[str, typer.Argument(help="Its name, as headgate status shows it.")],
    *,
    reason: Annotated[str, typer.Option(help="For the record.")] = "by hand",
) -> None:
    """Give a drained endpoint work again."""
    async with Client.from_settings(settings) as client:
        await order(client, Control(action="resume", endpoint=endpoint, reason=reason))
