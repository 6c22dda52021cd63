"""How a request is answered: its terminal record's body as it stands, or its token log as it grows.

A stream's status waits for its first word: who is refused before it gets an honest one. Only who waits so long that
a proxy might cut him off gets a status and a comment line before it, as others' doors send them. A slow reader holds
nothing but its own connection: past the transport's buffer the log is read no further, and the log keeps the rest.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from aiohttp import web

from dispatcher.client.handle import Handle
from dispatcher.door.ask import Ask
from dispatcher.door.chunks import Chunks
from dispatcher.door.refusal import Refusal, redis_away
from scheduler.errors import StreamError
from scheduler.wire.worker import Result

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the tokens back
}

STILL_HERE = b": still here\n\n"
"A comment, which every reader of event streams drops."

Judge = Callable[[Result, str], Awaitable[Refusal]]
"What a record that is no answer is to the client."


async def whole(request: web.Request, ask: Ask, handle: Handle, refused: Judge) -> web.Response:
    """The answer in one piece, written: what is counted of it can wait.

    Raises:
        Refusal: it ended otherwise, or Redis has lost it.
    """
    try:
        record = await handle.record()
    except StreamError as error:
        raise redis_away(error) from None
    if record.outcome != "completed":
        raise await _refusal(record, ask, refused)
    headers = named(ask, handle) | _server(record)
    response = web.Response(body=record.body, content_type="application/json", headers=headers)
    with contextlib.suppress(ConnectionError):  # aiohttp finds the client gone as well, and ends it
        await response.prepare(request)
        await response.write_eof()
    return response


class _Events(web.StreamResponse):
    """A response whose head leaves with its first word: one write, and the client is woken once."""

    _send_headers_immediately = False  # aiohttp's own, for its whole responses


class Stream:
    """An answer as chunks."""

    def __init__(
        self,
        request: web.Request,
        ask: Ask,
        handle: Handle,
        *,
        write_s: float,
        keepalive_s: float,
    ) -> None:
        """A client that takes nothing for `write_s` is cut off; one that gets nothing hears so every `keepalive_s`."""
        self._request, self._ask, self._handle = request, ask, handle
        self._write_s, self._quiet_s = write_s, keepalive_s or None
        self._chunks = Chunks(ask, request_id=ask.name or handle.id, created=int(time.time()))
        self._response = _Events(headers=STREAM_HEADERS | named(ask, handle))
        self.broken_by = ""
        "The reason of the error it ended with, after its first word."

    async def run(self, refused: Judge, begun: Callable[[], None]) -> web.StreamResponse:
        """Write it from its first word to its end.

        Raises:
            Refusal: it ended without an answer, or Redis lost it, before anything was sent.
            ConnectionResetError: the client is gone, or takes nothing.
        """
        try:
            return await self._run(refused, begun)
        except StreamError as error:
            refusal = redis_away(error)
            if not self._response.prepared:
                raise refusal from None
            await self._write(self._broken(refusal))
            await self._response.write_eof()
            return self._response

    async def _run(self, refused: Judge, begun: Callable[[], None]) -> web.StreamResponse:
        has_begun = False
        async with aclosing(self._handle.pieces(quiet_s=self._quiet_s)) as pieces:
            async for piece in pieces:
                events = self._chunks.piece(piece)
                await self._write(events or STILL_HERE)
                if events and not has_begun:
                    has_begun = True
                    begun()
        record = await self._handle.record()
        if record.outcome != "completed" and not self._response.prepared:
            raise await _refusal(record, self._ask, refused)
        await self._write(await self._ending(record, refused))
        if record.outcome == "completed" and not has_begun:
            begun()
        await self._response.write_eof()
        return self._response

    async def _ending(self, record: Result, refused: Judge) -> bytes:
        if record.outcome == "completed":
            return self._chunks.end(record)
        return self._broken(await refused(record, self._ask.model))

    def _broken(self, refusal: Refusal) -> bytes:
        self.broken_by = refusal.reason
        return self._chunks.broken(refusal)

    async def _write(self, events: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                if not self._response.prepared:
                    await self._response.prepare(self._request)
                await self._response.write(events)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError(f"the client took nothing for {self._write_s:g} s") from None


def named(ask: Ask, handle: Handle) -> dict[str, str]:
    """What the client calls it, and under which id it is found in the pool."""
    return {"x-request-id": ask.name or handle.id, "x-headgate-request": handle.id}


async def _refusal(record: Result, ask: Ask, refused: Judge) -> Refusal:
    refusal = await refused(record, ask.model)
    refusal.beside |= _server(record)
    return refusal


def _server(record: Result) -> dict[str, str]:
    """Who answered, where anybody did."""
    if not record.attempt:
        return {}
    return {"x-headgate-endpoint": record.endpoint, "x-headgate-attempt": str(record.attempt)}
