"""Terminal records, brought to whoever waits for them, whichever reply stream they come on."""

import asyncio
import contextlib
import logging
import time

from dispatcher.client.awaited import Awaited
from dispatcher.client.follower import Follower, Following, ended
from dispatcher.client.handle import BEGINNING
from dispatcher.client.standing import Standing
from dispatcher.streams import cut
from dispatcher.streams.connection import Connection
from scheduler import codec
from scheduler.errors import StreamError, UnknownRequestError, WireError
from scheduler.keys import Keys
from scheduler.wire.worker import Result

TRIM_EVERY_S = 60.0
log = logging.getLogger("headgate.client")


class Records:
    """The requests a client waits for, and the reply streams on which their records come.

    1. `expect` before the request is sent: from then on its record cannot be missed.
    2. The client's own stream is read from its beginning, all the time.
    3. `seek` finds the record of a request somebody else sent: in its hash, or on that one's reply stream.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        own: str,
        follower: Follower,
        *,
        kept_s: float,
    ) -> None:
        """`own` is the client's own stream; records stay on it for `kept_s`, for whoever attaches later."""
        self._connection = connection
        self._keys = keys
        self._own = own
        self._follower = follower
        self._expected: dict[str, Awaited] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._foreign: dict[str, set[str]] = {}
        self._kept_s = kept_s
        self._trimmed_at = time.monotonic()

    def start(self) -> None:
        """Begin to read the client's own stream."""
        self._read(self._own, BEGINNING)

    async def close(self) -> None:
        """Stop reading; who still waits gets a `StreamError`."""
        try:
            await ended(self._readers.values())
        finally:
            for awaited in self._expected.values():
                awaited.give_up(StreamError("the client was closed before the request ended"))
            self._expected.clear()

    def is_expected(self, request_id: str) -> bool:
        """Whether somebody waits for it."""
        return request_id in self._expected

    def expect(self, request_id: str) -> Awaited:
        """What will hold the record of this request."""
        if request_id not in self._expected:
            self._expected[request_id] = Awaited()
        return self._expected[request_id]

    def forget(self, request_id: str) -> None:
        """It was not sent after all."""
        self._expected.pop(request_id, None)

    def arrived(self, record: Result) -> None:
        """The record is here; nothing happens when nobody waits for it."""
        awaited = self._expected.pop(record.id, None)
        if awaited is not None:
            awaited.bring(record)

    async def seek(self, standing: Standing) -> None:
        """Bring the record of a request that was sent before, now or when it comes.

        Raises:
            UnknownRequestError: it ended, and its record is no longer kept.
        """
        if standing.state == "terminal":
            await self._fetch(standing)
            return
        reply = await self._reply_stream(standing)
        if reply == self._own:
            return
        # Position first, then state: a record written in between is on the stream behind the position.
        after = await self._last_entry(reply)
        self._foreign.setdefault(reply, set()).add(standing.id)
        if reply not in self._readers:
            self._read(reply, after)

    async def _fetch(self, standing: Standing) -> None:
        entry = standing.result_entry
        found = await self._connection.entries(standing.result_stream, entry, entry)
        if not found:
            self.forget(standing.id)
            raise UnknownRequestError(
                f"request {standing.id!r} ended as {standing.outcome}; its record is no longer kept"
            )
        self.arrived(codec.decode(Result, found[0][1]))

    async def _reply_stream(self, standing: Standing) -> str:
        """Where its record will be written, as its own entry says."""
        found = await self._connection.entries(self._keys.requests, standing.entry, standing.entry)
        named = found[0][1].get(b"reply_to", b"").decode() if found else ""
        return named or self._keys.results

    async def _last_entry(self, stream: str) -> str:
        newest = await self._connection.command("XREVRANGE", stream, "+", "-", "COUNT", 1)
        return str(newest[0][0], "ascii") if newest else BEGINNING

    def _read(self, stream: str, after: str) -> None:
        reader = asyncio.create_task(self._bring(stream, after), name=f"headgate-records-{stream}")
        self._readers[stream] = reader

    async def _bring(self, stream: str, after: str) -> None:
        following = self._follower.follow(stream, after, told=self._take)
        try:
            while stream == self._own or self._is_wanted(stream):
                await following.news.wait()
                following.news.clear()
                await self._trim(following)
        finally:
            self._follower.stop(following)
            del self._readers[stream]
            self._foreign.pop(stream, None)

    def _take(self, following: Following) -> None:
        for entry, fields in following.take():
            try:
                self.arrived(codec.decode(Result, fields))
            except WireError as error:
                log.warning("entry %s of %s is no record: %s", entry, following.stream, error)

    def _is_wanted(self, stream: str) -> bool:
        wanted = self._foreign.get(stream, set())
        wanted &= self._expected.keys()
        return bool(wanted)

    async def _trim(self, following: Following) -> None:
        """Cut what is old from the client's own stream: nobody else would."""
        if following.stream != self._own or time.monotonic() - self._trimmed_at < TRIM_EVERY_S:
            return
        self._trimmed_at = time.monotonic()
        before = int((self._connection.now() - self._kept_s) * 1e3)
        with contextlib.suppress(StreamError):
            await self._connection.command(*cut.older(self._own, f"{before}-0"))
