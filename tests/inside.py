"""A dispatcher and a worker within the test's own process: what is asked of their client goes the whole way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from dispatcher.client import Client
from dispatcher.node import Node
from dispatcher.streams.connection import Connection, Where
from scheduler.settings import (
    EngineAddress,
    LeaseSettings,
    RedisSettings,
    Settings,
    WorkerSettings,
)
from workers.worker import Worker


@contextlib.asynccontextmanager
async def served(engine_url: str, *, redis_url: str, pool: str) -> AsyncIterator[Client]:
    """A client of the pool, whose only endpoint `e0` is this engine."""
    settings = Settings(
        pool=pool,
        redis=RedisSettings(url=redis_url),
        lease=LeaseSettings(leader_s=3.0, worker_s=2.0, beat_s=0.1),
        worker=WorkerSettings(
            engines=(EngineAddress(name="e0", url=engine_url),), probe_s=0.1, drain_s=1.0
        ),
    )
    connection = await Connection.connect(Where(url=redis_url))
    worker = Worker(settings)
    dispatching = asyncio.create_task(Node(connection, settings, name="d").run())
    working = asyncio.create_task(worker.run(lambda: None))
    try:
        async with Client(redis=redis_url, pool=pool) as client:
            yield client
    finally:
        worker.stop()
        await working
        dispatching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await dispatching
        await connection.close()
