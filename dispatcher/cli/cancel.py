"""`headgate cancel`: one request, several, or all that a pipe names."""

import sys
from collections import Counter
from typing import Annotated

import typer

from dispatcher.cli import output
from dispatcher.client import Client
from scheduler.errors import UnknownRequestError
from scheduler.settings import Settings

app = typer.Typer()

STDIN = "-"


@app.command()
async def cancel(
    settings: Settings,
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="Or - for those on stdin.")],
    *,
    reason: Annotated[str, typer.Option(help="For the record.")] = "by hand",
) -> None:
    """End requests, wherever they are; the engine hears of it within a heartbeat.

    All that wait: headgate redis ZRANGE 'hg:{default}:waiting' 0 -1 | headgate cancel -
    """
    async with Client.from_settings(settings) as client:
        if len(ids) == 1 and ids[0] != STDIN:
            is_asked = await _one(client, ids[0], reason)
        else:
            is_asked = await _many(client, ids, reason)
    if not is_asked:
        raise typer.Exit(1)


async def _one(client: Client, request_id: str, reason: str) -> bool:
    """Ask, and say where it stood.

    Raises:
        UnknownRequestError: there is no such request.
    """
    is_asked = await client.cancel(request_id, reason=reason)
    standing = await client.status(request_id)
    if is_asked:
        output.talk(f"{request_id}: cancellation asked, it was {standing.state}")
    else:
        output.talk(f"{request_id}: ended already as {standing.outcome}")
    return is_asked


async def _many(client: Client, ids: list[str], reason: str) -> bool:
    """Ask for each, and say how many were asked; whether all were."""
    named = sys.stdin.read().split() if ids == [STDIN] else ids
    found: Counter[str] = Counter()
    for request_id in named:
        try:
            is_asked = await client.cancel(request_id, reason=reason)
        except UnknownRequestError:
            found["not known"] += 1
        else:
            found["asked to end" if is_asked else "ended already"] += 1
    said = ", ".join(f"{count} {what}" for what, count in found.items())
    output.talk(said or "no request was named")
    return found["asked to end"] == len(named)
