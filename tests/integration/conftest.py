"""The servers' parts, played, for all who test a client's side."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from played import Played


@pytest.fixture
async def played(redis_url: str, pool: str) -> AsyncIterator[Played]:
    """The servers' parts, running."""
    parts = await Played.start(redis_url, pool)
    running = asyncio.create_task(parts.run())
    yield parts
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await parts.close()
