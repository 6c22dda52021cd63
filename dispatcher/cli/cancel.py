"""`headgate cancel`."""

from typing import Annotated

import typer

from dispatcher.cli import output
from dispatcher.client import Client
from scheduler.settings import Settings

app = typer.Typer()


@app.command()
async def cancel(
    settings: Settings,
    request_id: Annotated[str, typer.Argument(metavar="ID")],
    *,
    reason: Annotated[str, typer.Option(help="For the record.")] = "by hand",
) -> None:
    """End a request, wherever it is; the engine hears of it within a heartbeat."""
    async with Client.from_settings(settings) as client:
        is_asked = await client.cancel(request_id, reason=reason)
        standing = await client.status(request_id)
    if is_asked:
        output.talk(f"{request_id}: cancellation asked, it was {standing.state}")
    else:
        output.talk(f"{request_id}: ended already as {standing.outcome}")
        raise typer.Exit(1)
