"""Whether somebody leads the pool, watched while a command waits: without a word it would look broken."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from dispatcher.cli import output
from dispatcher.client import Client
from scheduler.errors import StreamError

QUIET_S = 3.0
"Longer than a standby takes to lead after a death, so that what mends itself is not told."


@asynccontextmanager
async def telling(client: Client, told: Callable[[str], None] = output.talk) -> AsyncIterator[None]:
    """While the block waits, say when nobody leads the pool, and when somebody does again."""
    looking = asyncio.create_task(_look(client, told), name="headgate-leader-watch")
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait([looking])


async def _look(client: Client, told: Callable[[str], None]) -> None:
    pool, was_led = f"pool {client.keys.pool!r}", True
    while True:
        await asyncio.sleep(QUIET_S)
        with suppress(StreamError):  # Redis is away, which the client says, or we may not look
            is_led = await _is_led(client)
            if was_led and not is_led:
                told(
                    f"nobody leads {pool}: what is sent waits in Redis for a `headgate dispatcher`"
                )
            elif is_led and not was_led:
                told(f"{pool} is led again")
            was_led = is_led


async def _is_led(client: Client) -> bool:
    await client.connection.refresh_clock()
    until = await client.connection.command("HGET", client.keys.leader, "until")
    return int(until or 0) / 1e3 > client.connection.now()
