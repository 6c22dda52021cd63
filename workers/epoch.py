"""An endpoint's epoch: whoever joined last under its name is its worker, and all before are fenced.

Nothing else can be done without an answer, so both wait for as long as Redis is away.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from dispatcher.streams import sidecar
from dispatcher.streams.connection import Connection
from scheduler.errors import StreamError
from scheduler.keys import WORKER_GROUP, Keys

RETRY_S = 0.25
"How long to wait before asking again while Redis is away."

T = TypeVar("T")

log = structlog.get_logger()


async def join(connection: Connection, keys: Keys, endpoint: str, worker: str) -> int:
    """Become the endpoint's worker, once its stream of jobs is there: the new epoch."""
    call = sidecar.join(keys, endpoint, worker)

    async def joined() -> int:
        await connection.ensure_group(keys.jobs(endpoint), WORKER_GROUP)
        return int(await connection.call(call.function, call.keys, call.args))

    return await _answered(endpoint, joined)


async def is_forgotten(connection: Connection, keys: Keys, endpoint: str, epoch: int) -> bool:
    """Whether Redis has lost this epoch (emptied, failed over, or without its last second), and not given a newer one."""

    async def found() -> int:
        return int(await connection.command("HGET", keys.endpoint(endpoint), "epoch") or 0)

    return await _answered(endpoint, found) < epoch


async def _answered(endpoint: str, ask: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await ask()
        except StreamError as error:
            log.warning("redis_away", endpoint=endpoint, reason=str(error))
            await asyncio.sleep(RETRY_S)
