"""`headgate drain`: take an endpoint out of service without losing what it does."""

import asyncio
from typing import Annotated

import typer

from dispatcher.cli import output
from dispatcher.client import Client
from scheduler import codec
from scheduler.errors import SettingsError
from scheduler.settings import LONG_S, Settings
from scheduler.wire.client import Control

app = typer.Typer()

POLL_S = 0.2
"How often the endpoint's stream is counted: a person watches."


@app.command()
async def drain(
    settings: Settings,
    endpoint: Annotated[str, typer.Argument(help="Its name, as headgate status shows it.")],
    *,
    wait: Annotated[bool, typer.Option(help="--no-wait leaves at once.")] = True,
    timeout_s: Annotated[
        float, typer.Option(min=0, max=LONG_S, help="Stop waiting; exit code 1.")
    ] = 600.0,
    reason: Annotated[str, typer.Option(help="For the record.")] = "by hand",
) -> None:
    """Give an endpoint no new work and wait until it has none.

    It stays drained, whatever restarts, until headgate resume.
    """
    async with Client.from_settings(settings) as client:
        await order(client, Control(action="drain", endpoint=endpoint, reason=reason))
        if not wait:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await _until_empty(client, endpoint)
        except TimeoutError:
            output.talk(f"{endpoint}: still busy after {output.seconds(timeout_s)}")
            raise typer.Exit(1) from None


async def order(client: Client, control: Control) -> None:
    """Put a control of an endpoint on the pool's `controls`.

    Raises:
        SettingsError: no such endpoint has ever beaten here.
    """
    key = client.keys.endpoint(control.endpoint)
    if not await client.connection.command("EXISTS", key):
        raise SettingsError(
            f"endpoint {control.endpoint!r} is not known in {client.keys.root}; see headgate status"
        )
    await client.connection.add(client.keys.controls, codec.encode(control))


async def _until_empty(client: Client, endpoint: str) -> None:
    said = -1
    while left := int(await client.connection.command("XLEN", client.keys.jobs(endpoint))):
        if left != said:
            output.talk(f"{endpoint}: {left} left")
            said = left
        await asyncio.sleep(POLL_S)
    output.talk(f"{endpoint}: empty")
