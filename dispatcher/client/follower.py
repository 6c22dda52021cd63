"""Many streams followed over few connections, each from a position known beforehand, so nothing is missed.

A blocked XREAD cannot take one more stream in. So each stream gets a reader of its own while there are few. Past
that it joins the reader with the fewest; one that does not come back by itself at once, as it does where many talk,
has its wait broken off, which costs a connection and no entry.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from dispatcher.streams.connection import Connection, Entry, Read
from scheduler.errors import StreamError

READERS_MAX = 8
"Connections that wait for token logs, whatever the number of logs."

WAIT_S = 2.0
"How long a read waits on the server; only a bound, entries and whoever joins end it at once."

JOIN_S = 0.002
"How long a reader may take to come back by itself when a stream has joined it."

LEAVE_S = 0.05
"How long a reader that nobody needs any more may take to come back by itself: its log often ends, and its connection is kept."

AHEAD_MAX = 256
"Entries kept for somebody who reads slower than they come; the log itself keeps the rest."

RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
"Between tries while Redis is away."

log = logging.getLogger("headgate.client")


IsLast = Callable[[Mapping[bytes, bytes]], bool]
"Whether an entry with these fields is its stream's last."

Told = Callable[["Following"], None]
"Called when entries have come, or Redis is back."


class Following:
    """One stream being followed: entries that came, and a signal that some did."""

    def __init__(
        self,
        stream: str,
        after: str,
        is_last: IsLast,
        told: Told | None,
        resumed: Told | None,
    ) -> None:
        self.stream = stream
        self.after = after
        "The last entry that was read."
        self.news = asyncio.Event()
        self.is_over = False
        self.room = asyncio.Event()
        self.room.set()
        self._is_last = is_last
        self._told = told
        self._resumed = resumed
        self._entries: deque[Entry] = deque()

    def put(self, entries: list[Entry]) -> None:
        """What the reader brings."""
        self._entries.extend(entries)
        self.after, fields = entries[-1]
        self.is_over = self.is_over or self._is_last(fields)
        if len(self._entries) >= AHEAD_MAX:
            self.room.clear()
        if self._told is not None:
            self._told(self)
        self.news.set()

    def resume(self) -> None:
        """Redis was away, and could be read again."""
        if self._resumed is not None:
            self._resumed(self)

    def take(self) -> list[Entry]:
        """All that has come since the last call."""
        taken = list(self._entries)
        self._entries.clear()
        self.news.clear()
        self.room.set()
        return taken


async def ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel these and wait until they are over; what one of them failed with is raised."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        # Not `await task`: its cancel and one of our own could not be told apart.
        await asyncio.wait(ending)
    for task in ending:
        if not task.cancelled():
            task.result()


class Follower:
    """The readers of one client."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outage = _Outage()
        self._readers: dict[asyncio.Task[None], _Reader] = {}

    def follow(
        self,
        stream: str,
        after: str,
        *,
        is_last: IsLast = lambda _: False,
        told: Told | None = None,
        resumed: Told | None = None,
    ) -> Following:
        """Read the stream from behind `after` until its last entry, or until `stop`.

        `told` may take what came at once; whoever waits for `news` has his turn after it. `resumed` hears that Redis
        was away and is back.
        """
        following = Following(stream, after, is_last, told, resumed)
        if len(self._readers) < READERS_MAX:
            reader = _Reader(self._connection, self._outage)
            task = asyncio.create_task(self._run(reader), name=f"headgate-reader-{stream}")
            self._readers[task] = reader
        else:
            reader = min(self._readers.values(), key=lambda one: len(one.share))
        reader.join(following)
        return following

    def stop(self, following: Following) -> None:
        """No more of this stream; its reader ends with its last stream."""
        following.is_over = True
        following.room.set()
        for reader in self._readers.values():
            reader.note_leaving(following)

    async def entries(self, stream: str, first: str, last: str = "+") -> list[Entry]:
        """All that the stream holds from `first` to `last`, now or when Redis can be read again."""
        delay_s = RETRY_FIRST_S
        while True:
            try:
                return await self._connection.entries(stream, first, last)
            except StreamError as error:
                log.debug("%s is not read yet: %s", stream, error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)

    async def close(self) -> None:
        """End every reader."""
        await ended(self._readers)

    async def _run(self, reader: "_Reader") -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await reader.run()
        finally:
            # No wait between the last look at the share and this, so nobody can have joined.
            del self._readers[task]
            self._outage.over(reader)


class _Outage:
    """Who cannot read: said when the first one cannot and when the last one can again, not by every reader at every try."""

    def __init__(self) -> None:
        self._without: set[_Reader] = set()

    def note(self, reader: "_Reader", error: StreamError) -> None:
        """It could not read."""
        if not self._without:
            log.warning("cannot read replies, trying until that works: %s", error)
        self._without.add(reader)

    def over(self, reader: "_Reader") -> None:
        """It could, or reads no more."""
        if reader in self._without:
            self._without.discard(reader)
            if not self._without:
                log.info("replies can be read again")


class _Reader:
    """One connection that waits for a share of the streams, while there is any."""

    def __init__(self, connection: Connection, outage: _Outage) -> None:
        self._connection, self._outage = connection, outage
        self.share: list[Following] = []
        self._waiting: asyncio.Timeout | None = None
        "The wait under way."

    def join(self, following: Following) -> None:
        """Read this stream as well."""
        self.share.append(following)
        self._break_off(JOIN_S)

    def note_leaving(self, following: Following) -> None:
        """This stream is over, wherever it was read; whoever waits for nobody must not wait for long."""
        if following in self.share and not self._living():
            self._break_off(LEAVE_S)

    async def run(self) -> None:
        """Read until the last stream is over."""
        delay_s, was_away = RETRY_FIRST_S, False
        while self._living():
            try:
                await self._turn()
            except TimeoutError:
                continue  # the share is another
            except StreamError as error:
                self._outage.note(self, error)
                await asyncio.sleep(delay_s)
                delay_s, was_away = min(2 * delay_s, RETRY_MAX_S), True
            else:
                self._outage.over(self)
                if was_away:
                    for one in self.share:
                        one.resume()
                delay_s, was_away = RETRY_FIRST_S, False

    def _break_off(self, after_s: float) -> None:
        """End the wait under way, if it has not ended by then; the reader looks at its share anew."""
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time() + after_s)

    def _living(self) -> list[Following]:
        self.share = [one for one in self.share if not one.is_over]
        return self.share

    async def _turn(self) -> None:
        try:
            async with asyncio.timeout(None) as self._waiting:
                await self._wait()
        finally:
            self._waiting = None

    async def _wait(self) -> None:
        open_ones = [one for one in self.share if one.room.is_set()]
        if not open_ones:
            await _any_room(self.share)
            return
        # Two followers of one stream take turns: a command can name it once.
        self.share.append(self.share.pop(0))
        wanted = {one.stream: one for one in open_ones}

        def came(read: Read) -> None:
            for name, entries in read.items():
                if entries:
                    wanted[name].put(entries)

        await self._connection.read(
            {name: one.after for name, one in wanted.items()},
            count=AHEAD_MAX,
            block_s=WAIT_S,
            came=came,
        )
        await asyncio.sleep(0)  # who waited for it has his turn before more is asked for


async def _any_room(share: list[Following]) -> None:
    waits = [asyncio.ensure_future(one.room.wait()) for one in share]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
