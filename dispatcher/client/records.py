"""Terminal records, brought to whoever waits for them, whichever reply stream they come on."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Mapping

from dispatcher.client.awaited import Awaited
from dispatcher.client.follower import Follower, Following, ended
from dispatcher.client.handle import BEGINNING
from dispatcher.client.standing import Standing, standing
from dispatcher.streams import cut
from dispatcher.streams.connection import Connection
from scheduler import codec
from scheduler.errors import StreamError, UnknownRequestError, WireError
from scheduler.keys import Keys
from scheduler.wire.worker import Result

TRIM_EVERY_S = 60.0

LOOK_EVERY_S = 10.0
"A Redis emptied while it runs tells nobody: so often the request waited for longest is looked for, which is among the lost."

LOOK_BATCH = 500
"Requests looked for in one round trip."

LOOK_AGAIN_S = 0.5
"After a look that failed."

CLOSED = StreamError("the client was closed before the request ended")

log = logging.getLogger("headgate.client")


class Records:
    """The requests a client waits for, and the reply streams on which their records come.

    1. `expect` before the request is sent: from then on its record cannot be missed.
    2. The client's own stream is read from its beginning, all the time.
    3. `seek` finds the record of a request somebody else sent: in its hash, or on that one's reply stream.
    4. Whenever Redis was away, or has lost the oldest, all that are waited for are looked for: it may have lost more.
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
        self._looking: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_closed = False
        self._kept_s = kept_s
        self._trimmed_at = time.monotonic()

    def start(self) -> None:
        """Begin to read the client's own stream, and to look after those that are waited for."""
        self._read(self._own, BEGINNING)
        self._watching = asyncio.create_task(self._watch(), name="headgate-records-watch")

    async def close(self) -> None:
        """Stop reading; who still waits gets a `StreamError`."""
        try:
            others = (self._watching, self._looking)
            await ended([*self._readers.values(), *(one for one in others if one is not None)])
        finally:
            self._is_closed = True
            for awaited in self._expected.values():
                awaited.give_up(CLOSED)
            self._expected.clear()

    def is_expected(self, request_id: str) -> bool:
        """Whether somebody waits for it."""
        return request_id in self._expected

    def expect(self, request_id: str) -> Awaited:
        """What will hold the record of this request."""
        if self._is_closed:  # nobody would bring it
            awaited = Awaited()
            awaited.give_up(CLOSED)
            return awaited
        if request_id not in self._expected:
            self._expected[request_id] = Awaited()
        return self._expected[request_id]

    def sent(self, request_id: str) -> None:
        """Redis has it."""
        if request_id in self._expected:  # else it has ended already
            self._expected[request_id].is_sent = True

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
        self.sent(standing.id)
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
        resumed = self._look if stream == self._own else None
        following = self._follower.follow(stream, after, told=self._take, resumed=resumed)
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

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            oldest = next((one for one, at in self._expected.items() if at.is_sent), None)
            if oldest is None:
                continue
            with contextlib.suppress(
                StreamError
            ):  # away: whoever reads notices, and all are looked for
                if not await self._connection.command("HGETALL", self._keys.request(oldest)):
                    self._look()

    def _look(self, _: Following | None = None) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_for_all(), name="headgate-records-look")

    async def _look_for_all(self) -> None:
        """Bring what ended meanwhile; who waits for what Redis has lost must not wait for ever."""
        sent = [one for one, awaited in self._expected.items() if awaited.is_sent]
        while sent:
            part = sent[:LOOK_BATCH]
            try:
                hashes = await self._connection.commands(
                    [("HGETALL", self._keys.request(one)) for one in part]
                )
                for request_id, raw in zip(part, hashes, strict=True):
                    await self._found(request_id, raw)
            except StreamError:
                await asyncio.sleep(LOOK_AGAIN_S)
            else:
                del sent[:LOOK_BATCH]

    async def is_unread(self, request_id: str) -> bool:
        """Whether a hand has added it, without an id, and nobody has read it yet: it is an entry and nothing else."""
        return re.fullmatch(r"\d+-\d+", request_id) is not None and bool(
            await self._connection.entries(self._keys.requests, request_id, request_id)
        )

    async def _found(self, request_id: str, raw: Mapping[bytes, bytes]) -> None:
        awaited = self._expected.get(request_id)
        if awaited is None:
            return
        if not raw and await self.is_unread(request_id):
            return
        why = f"redis at {self._connection.shown} has lost request {request_id!r}, send it again"
        if raw:
            at = standing(request_id, raw)
            if at.state != "terminal":
                return
            try:
                await self._fetch(at)
            except UnknownRequestError as error:
                why = str(error)
            else:
                return
        self.forget(request_id)
        awaited.give_up(StreamError(why))

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
