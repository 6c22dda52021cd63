"""Posts to one engine: written the moment they are made, answered without a task in between.

Why beside aiohttp, which does all else here: on Python 3.11 it writes a request one turn of the loop after it was asked
to, headers and body apart, and wakes the asker for every chunk; a first token waited for both (docs/PERFORMANCE.md).
The parser is uvicorn's, httptools.

A connection carries one post at a time and is kept for the next:

1. idle     kept for `KEPT_S`, unless the engine closes it before
2. posted   request written; a success's bytes go to `heard` as they come, an error's are kept
3. idle     the answer is complete, and the engine keeps the connection; else it is closed
   closed   the reply was cancelled, or the engine broke off
"""

import asyncio
import base64
import contextlib
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeAlias, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

import httptools

from scheduler.errors import EngineError

KEPT_S = 30.0
"How long an idle connection is kept; an engine that closes sooner is noticed at once."

STALE_S = 0.5
"A kept connection that is closed so soon after a post was closed before it: what takes longer may have been served."

ERROR_BYTES = 64 * 1024
"How much of an error's body is read."

HEAD_BYTES = 64 * 1024
"The longest head of an answer; nobody writes a tenth of it."

PORTS = {"http": 80, "https": 443}

Heard = Callable[[bytes], None]

Reply: TypeAlias = asyncio.Future[tuple[int, bytes]]
"""
What will hold the answer's status, and the beginning of its body unless it was 200; then `heard` got it all.

Cancelling it closes the connection.
"""


class StaleError(EngineError):
    """A kept connection was closed before anything came: most likely when it was written to, and nobody has read it."""


class Posts:
    """The connections to one engine. Every failure leaves as an `EngineError`."""

    def __init__(self, root: str, headers: Mapping[str, str], *, connect_s: float) -> None:
        """`root` is a checked URL; `headers` go with every post."""
        parts = urlsplit(root)
        self._host = parts.hostname or ""
        self._port = parts.port or PORTS[parts.scheme]
        self._path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
        self._headers = {"Host": parts.netloc.rpartition("@")[2], **_login(parts), **headers}
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_s = connect_s
        self._idle: deque[_Connection] = deque()
        "The one used last at the right."

    def close(self) -> None:
        """Close the idle ones; the others close with their askers."""
        while self._idle:
            self._idle.pop().abort()

    def begin(
        self, path: str, data: bytes, headers: Mapping[str, str], heard: Heard
    ) -> Reply | None:
        """Post now, over a kept connection; None: there is none, nothing was written.

        What `heard` raises ends the answer, and is the reply's error. A `StaleError` of the reply asks for a `send`.

        Raises:
            EngineError: a header that cannot be sent.
        """
        connection = self._kept()
        if connection is None:
            return None
        return self._posted(connection, self._request(path, data, headers), heard)

    async def send(
        self, path: str, data: bytes, headers: Mapping[str, str], heard: Heard
    ) -> tuple[int, bytes]:
        """Post over a kept connection, or a new one where there is none or it was stale; what the `Reply` holds.

        Raises:
            EngineError: no connection, or it was lost before the answer's end, or what came is no HTTP.
        """
        request = self._request(path, data, headers)
        kept = self._kept()
        if kept is not None:
            with contextlib.suppress(StaleError):
                return await self._posted(kept, request, heard)
        return await self._posted(await self._made(), request, heard)

    def _posted(self, connection: "_Connection", request: bytes, heard: Heard) -> Reply:
        reply = connection.post(request, heard)
        reply.add_done_callback(lambda _: self._over(connection))
        return reply

    def _over(self, connection: "_Connection") -> None:
        if connection.is_reusable:
            connection.rest()
            self._idle.append(connection)
        else:
            connection.abort()

    def _request(self, path: str, data: bytes, headers: Mapping[str, str]) -> bytes:
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._own_lines}{_lines(headers)}"
        return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    @cached_property
    def _own_lines(self) -> str:
        return _lines(self._headers)

    def _kept(self) -> "_Connection | None":
        before = asyncio.get_running_loop().time() - KEPT_S
        while self._idle and (self._idle[0].is_lost or self._idle[0].idle_since < before):
            self._idle.popleft().abort()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_lost:
                return connection
        return None

    async def _made(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise EngineError("no answer in time") from None
        except (OSError, UnicodeError) as error:  # a name that IDNA refuses is the latter
            raise EngineError(f"connection: {error or type(error).__name__}") from error
        return connection


class _Connection(asyncio.Protocol):
    """One connection, and the exchange on it."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.is_lost = False
        self.is_reusable = False
        "The answer is complete, and another may follow on this connection."
        self._posted_at = 0.0
        self._is_kept = False
        "It has carried an answer before."
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._asker: Reply | None = None
        self._heard: Heard | None = None
        self._status = 0
        self._has_length = False
        self._parts: list[bytes] = []
        "Of the body, since the last bytes came; of an error all of it."
        self._bare_bytes = 0
        "Come since the last of the body; of a sound answer its head, a chunk's size, its end."
        self._has_body = False
        self._keeps = False
        self._is_complete = False
        self._is_double = False
        "Behind it came another, which nobody asked for: what of these is ours nobody can say."

    def post(self, request: bytes, heard: Heard) -> Reply:
        """Write the request; what will hold the status, and an error's body."""
        loop = asyncio.get_running_loop()
        self._asker, self._posted_at = loop.create_future(), loop.time()
        self._parser = httptools.HttpResponseParser(self)
        self._heard, self._parts = heard, []
        self._status = self._bare_bytes = 0
        self._has_body = self._is_double = self._has_length = self._is_complete = (
            self.is_reusable
        ) = False
        if self.is_lost or self._transport is None:
            self._asker.set_exception(EngineError("connection: lost"))
        else:
            self._transport.write(request)
        return self._asker

    def rest(self) -> None:
        """Wait for the next post."""
        self.idle_since = asyncio.get_running_loop().time()
        self._heard = self._parser = None
        self._is_kept = True

    def abort(self) -> None:
        """Close it at once."""
        self.is_lost = True
        self._heard = self._parser = None
        if self._transport is not None:
            self._transport.abort()

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        asker, parser, heard = self._asker, self._parser, self._heard
        if asker is None or asker.done() or parser is None or heard is None:
            self.abort()  # nobody asked, or whoever did has gone
            return
        try:
            parser.feed_data(data)
            if self._is_double:
                raise EngineError("the engine sent two answers to one request")  # noqa: TRY301
            is_enough = self._is_enough(len(data))
            if self._status == 200 and self._parts:
                parts, self._parts = self._parts, []
                heard(parts[0] if len(parts) == 1 else b"".join(parts))
        except httptools.HttpParserUpgrade:
            asker.set_exception(EngineError("it switches to another protocol, unasked"))
        except httptools.HttpParserError as error:
            asker.set_exception(EngineError(f"no HTTP: {error}"))
        except Exception as error:  # noqa: BLE001
            # Whatever is wrong with the answer is the asker's to judge, not the event loop's.
            asker.set_exception(error)
        else:
            if self._is_complete or is_enough:
                self.is_reusable = self._is_complete and self._keeps
                self._answer(asker)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        asker = self._asker
        if asker is None or asker.done():
            return
        if self._status and not self._has_length and exc is None:
            self._answer(asker)  # it ends where the connection ends
        elif self._status:
            broken = "the connection broke off in the middle of the answer"
            asker.set_exception(EngineError(broken))
        else:
            kind = StaleError if self._is_stale else EngineError
            asker.set_exception(kind(f"connection: {exc or 'closed before the answer'}"))

    @property
    def _is_stale(self) -> bool:
        waited_s = asyncio.get_running_loop().time() - self._posted_at
        return self._is_kept and not self._bare_bytes and waited_s < STALE_S

    # What the parser says.

    def on_message_begin(self) -> None:
        self._is_double = self._is_complete

    def on_header(self, name: bytes, _: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        self._status = status if status >= 200 else 0  # 1xx: the answer is yet to come
        self._keeps = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._has_body = True

    def on_message_complete(self) -> None:
        self._is_complete = bool(self._status)

    def _is_enough(self, size: int) -> bool:
        """Whether an error has said as much as is read; a head that says too much is refused, and what trails the body."""
        if self._has_body:
            self._has_body, self._bare_bytes = False, 0
            return self._status != 200 and sum(map(len, self._parts)) >= ERROR_BYTES
        self._bare_bytes += size
        if self._bare_bytes > HEAD_BYTES:
            raise EngineError(f"an answer's head or trailer of over {HEAD_BYTES} bytes")
        return False

    def _answer(self, asker: Reply) -> None:
        asker.set_result((self._status, b"".join(self._parts)[:ERROR_BYTES]))


def _lines(headers: Mapping[str, str]) -> str:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise EngineError("a header holds a line break", retryable=False)
    return lines


def _login(parts: SplitResult) -> dict[str, str]:
    """A name and password in the URL, as browsers send them: what is quoted there is not in the header."""
    if parts.username is None:
        return {}
    said = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(said.encode()).decode()}"}
