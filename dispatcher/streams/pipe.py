"""One connection to one server, spoken to without waiting in turn: many commands out, their replies back in order.

Why beside redis-py: it packs commands in Python and reads each reply under a timeout of its own, 10 us a command in
a pipeline where this takes 2 (docs/PERFORMANCE.md). For plain TCP and unix sockets; TLS, Cluster and Sentinel are
left to redis-py. Nothing is ever said again here: whoever asks knows whether that is safe.

1. closed       the first `ask` connects, logs in and selects the database
2. open         every `ask` is written at once; replies belong to the askers in the order of their asking
3. lost         all who wait get `ConnectionError`; back to 1
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import hiredis
from redis.exceptions import ResponseError

from dispatcher.streams.where import Where

CONNECT_S = 5.0
"The longest wait for a server that does not take the connection."

TURNED_AWAY = "ERR max number of clients"
"How a server begins that has no room for a connection: it answers no question, and closes."

Words = tuple[str | bytes | int | float, ...]
"A command: its name and its arguments."

Begun: TypeAlias = asyncio.Future[list[Any]]
"The replies to come of commands that are written."

Came = Callable[[list[Any]], None]
"Told of replies as soon as all are there."


class Address(NamedTuple):
    """A server that a `Pipe` can reach."""

    host: str
    "Empty for a unix socket."
    port: int
    path: str
    login: tuple[Words, ...]
    "What is said first on every new connection."

    @classmethod
    def of(cls, where: Where) -> "Address | None":
        """The URL's server; None where only redis-py can reach it as asked.

        >>> Address.of(Where(url="redis://me:it@h/3")).login
        (('AUTH', 'me', 'it'), ('SELECT', '3'))
        >>> Address.of(Where(url="rediss://h"))
        """
        parts = urlsplit(where.url)
        options = dict(parse_qsl(parts.query))
        db = options.pop("db", "") or (parts.path.strip("/") if parts.scheme == "redis" else "")
        if parts.scheme not in ("redis", "unix") or options or not (db or "0").isdigit():
            return None
        username = where.username or unquote(parts.username or "")
        password = where.password or unquote(parts.password or "")
        login: list[Words] = []
        if password:  # with the name said, a server that wants no password takes any, as redis-py's HELLO does
            login.append(("AUTH", username or "default", password))
        if int(db or 0):
            login.append(("SELECT", db))
        is_unix = parts.scheme == "unix"
        return cls(
            host="" if is_unix else parts.hostname or "localhost",
            port=parts.port or 6379,
            path=unquote(parts.path) if is_unix else "",
            login=tuple(login),
        )


class Pipe:
    """One connection, made when it is first needed and again after it was lost."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._wire: _Wire | None = None
        self._opening = asyncio.Lock()

    def begin(self, commands: Sequence[Words], came: Came | None = None) -> Begun | None:
        """Write these now, before any other task has its turn; None: there is no connection, nothing was written."""
        wire = self._wire
        return None if wire is None or wire.is_lost else wire.ask(commands, came)

    def extend(self, begun: Begun, commands: Sequence[Words]) -> bool:
        """Write these as well, in a write of their own: their replies belong to what was begun. False: it is too late."""
        return self._wire is not None and self._wire.extend(begun, commands)

    async def replies(self, begun: Begun, *, limit_s: float | None) -> list[Any]:
        """The replies to what was begun, in order; an error of the server's is such a reply.

        Raises:
            OSError: the connection was lost before the last reply.
            TimeoutError: not all had come after `limit_s`; the connection is given up.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await begun
        except TimeoutError:
            # They came in the very turn in which the time ran out: whoever is told first was told.
            if begun.done() and not begun.cancelled():
                return begun.result()
            self.close()  # a frozen server's late replies would be the next asker's
            raise

    async def ask(
        self, commands: Sequence[Words], *, limit_s: float | None, came: Came | None = None
    ) -> list[Any]:
        """Begin, over a new connection where there is none, and wait for the replies.

        `came` gets them first, before any task has its turn; what it raises is raised here.

        Raises:
            OSError: as `replies`, or the connection cannot be made.
            TimeoutError: as `replies`.
        """
        if not commands:
            return []
        begun = self.begin(commands, came) or (await self._open()).ask(commands, came)
        return await self.replies(begun, limit_s=limit_s)

    def close(self) -> None:
        """Drop the connection; whoever waits gets `ConnectionError`."""
        if self._wire is not None:
            self._wire.abort()

    async def _open(self) -> "_Wire":
        async with self._opening:
            if self._wire is not None and not self._wire.is_lost:
                return self._wire  # somebody else was faster
            loop, address = asyncio.get_running_loop(), self._address
            async with asyncio.timeout(CONNECT_S):
                if address.path:
                    _, wire = await loop.create_unix_connection(_Wire, address.path)
                else:
                    _, wire = await loop.create_connection(_Wire, address.host, address.port)
                for reply in await wire.ask(address.login) if address.login else ():
                    if isinstance(reply, Exception):
                        wire.abort()
                        raise reply
            self._wire = wire
            return wire


class _Asked:
    """Who asked, how many replies they want, who is told of them first, and what they have got so far."""

    __slots__ = ("came", "future", "replies", "wanted")

    def __init__(self, future: Begun, wanted: int, came: Came | None) -> None:
        self.future, self.wanted, self.came = future, wanted, came
        self.replies: list[Any] = []


class _Wire(asyncio.Protocol):
    """One open connection's two directions."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(replyError=_complaint)
        self._waiting: deque[_Asked] = deque()
        self._transport: asyncio.Transport | None = None
        self.is_lost = False
        self._why = "closed by the server"

    def ask(self, commands: Sequence[Words], came: Came | None = None) -> Begun:
        """Write these; what will hold their replies."""
        assert commands, "nothing is asked"
        if self.is_lost or self._transport is None:
            raise ConnectionError("connection lost")
        future: Begun = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(future, len(commands), came))
        self._write(commands)
        return future

    def extend(self, future: Begun, commands: Sequence[Words]) -> bool:
        """Write these behind what this future waits for; False: something else has been asked since, or it has all."""
        if self.is_lost or not self._waiting or self._waiting[-1].future is not future:
            return False
        self._waiting[-1].wanted += len(commands)
        self._write(commands)
        return True

    def _write(self, commands: Sequence[Words]) -> None:
        assert self._transport is not None
        pack: Callable[[Words], bytes] = hiredis.pack_command  # type: ignore[assignment]  # its stub says 1-tuple
        self._transport.write(b"".join(map(pack, commands)))

    def abort(self) -> None:
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            if (
                not waiting or type(reply) is ConnectionError
            ):  # nobody's reply: the server's last word
                self._why = str(reply)
                self.abort()
                return
            asked = waiting[0]
            asked.replies.append(reply)
            if len(asked.replies) == asked.wanted:
                waiting.popleft()
                if not asked.future.done():  # else whoever asked was cancelled meanwhile
                    _settle(asked.future, asked.replies, asked.came)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        error = ConnectionError(f"connection lost: {exc or self._why}")
        while self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_exception(error)


def _complaint(said: str) -> Exception:
    """An error as a reply, or as the end of the connection."""
    return ConnectionError(said) if said.startswith(TURNED_AWAY) else ResponseError(said)


def _settle(future: Begun, replies: list[Any], came: Came | None) -> None:
    try:
        if came is not None:
            came(replies)
    except Exception as error:  # noqa: BLE001  the asker's to judge, not the event loop's
        future.set_exception(error)
    else:
        future.set_result(replies)
