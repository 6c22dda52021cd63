"""Many streams followed over few connections, each from a position known beforehand, so nothing is missed.

A blocked XREAD cannot take one more stream in. So each stream gets a reader of its own while there are few; past
that it joins the reader with the fewest, at the latest when that one's short wait is over.
"""

import asyncio
import contextlib
import logging
from collections import deque

from dispatcher.streams.connection import Connection, Entry
from scheduler.errors import StreamError

READERS_MAX = 8
"Connections that wait for token logs, whatever the number of logs."

WAIT_S = 0.1
"How long a shared reader waits before it looks whether a stream has joined."

AHEAD_MAX = 256
"Entries kept for somebody who reads slower than they come; the log itself keeps the rest."

RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
"Between tries while Redis is away."

log = logging.getLogger("headgate.client")


class Following:
    """One stream being followed: entries that came, and a signal that some did."""

    def __init__(self, stream: str, after: str) -> None:
        self.stream = stream
        self.after = after
        "The last entry that was read."
        self.news = asyncio.Event()
        self.is_over = False
        self.room = asyncio.Event()
        self.room.set()
        self._entries: deque[Entry] = deque()

    def put(self, entries: list[Entry]) -> None:
        """What the reader brings."""
        self._entries.extend(entries)
        self.after = entries[-1][0]
        if len(self._entries) >= AHEAD_MAX:
            self.room.clear()
        self.news.set()

    def take(self) -> list[Entry]:
        """All that has come since the last call."""
        taken = list(self._entries)
        self._entries.clear()
        self.news.clear()
        self.room.set()
        return taken


class Follower:
    """The readers of one client."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._readers: dict[asyncio.Task[None], list[Following]] = {}

    def follow(self, stream: str, after: str) -> Following:
        """Read the stream from behind `after` until `stop`."""
        following = Following(stream, after)
        if len(self._readers) < READERS_MAX:
            share = [following]
            reader = asyncio.create_task(self._read(share), name=f"headgate-reader-{stream}")
            self._readers[reader] = share
        else:
            min(self._readers.values(), key=len).append(following)
        return following

    def stop(self, following: Following) -> None:
        """No more of this stream; its reader ends with its last stream."""
        following.is_over = True
        following.room.set()

    async def close(self) -> None:
        """End every reader."""
        readers = list(self._readers)
        for reader in readers:
            reader.cancel()
        for reader in readers:
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, share: list[Following]) -> None:
        try:
            await self._read_while_followed(share)
        finally:
            # No wait between the last look at the share and this, so nobody can have joined.
            del self._readers[self._me()]

    def _me(self) -> asyncio.Task[None]:
        task = asyncio.current_task()
        assert task is not None
        return task

    async def _read_while_followed(self, share: list[Following]) -> None:
        delay_s = RETRY_FIRST_S
        while _living(share):
            open_ones = [f for f in share if f.room.is_set()]
            if not open_ones:
                await _any_room(share)
                continue
            try:
                # Two followers of one stream take turns: a command can name it once.
                wanted = {f.stream: f for f in open_ones}
                came = await self._connection.read(
                    {name: f.after for name, f in wanted.items()},
                    count=AHEAD_MAX,
                    block_s=WAIT_S,
                )
            except StreamError as error:
                log.warning("cannot read replies, trying again in %.2g s: %s", delay_s, error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
                continue
            delay_s = RETRY_FIRST_S
            for name, entries in came.items():
                if entries:
                    wanted[name].put(entries)
            share.insert(0, share.pop())


def _living(share: list[Following]) -> list[Following]:
    """The same list, without those that are over: `follow` appends to it."""
    share[:] = [f for f in share if not f.is_over]
    return share


async def _any_room(share: list[Following]) -> None:
    waits = [asyncio.ensure_future(f.room.wait()) for f in share]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
