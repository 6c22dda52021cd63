"""Redis's own protocol over a plain socket: enough to knock, to ask and to print.

`streams.py` is the one module that works with Redis. This is for the two that come before and beside it:
the starter of a private server, which must know whether one answers, and `headgate redis`, for machines
without redis-cli. RESP2, one request at a time, blocking.
"""

import socket
import ssl
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from scheduler.errors import SettingsError, StreamError

DEFAULT_PORT = 6379
CHUNK_BYTES = 65536

CONNECT_S = 5.0
"How long a server may take to accept; a reply may then take as long as its caller lets it."


class Status(str):
    """A simple string, `OK` or `PONG`: printed bare where a bulk string is quoted."""

    __slots__ = ()


class Failure(str):
    """An error reply; a value and not an exception, because it may sit inside an array."""

    __slots__ = ()


Reply: TypeAlias = "Status | Failure | bytes | int | list[Reply] | None"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a Redis URL points."""

    host: str = ""
    port: int = DEFAULT_PORT

    path: str = ""
    "A unix socket; empty means TCP."

    database: int = 0
    username: str = ""
    password: str = ""
    is_tls: bool = False

    def __str__(self) -> str:
        """The address without its secrets, for messages."""
        return self.path or f"{self.host}:{self.port}"


def address(url: str) -> Address:
    """The address in a `redis://`, `rediss://` or `unix://` URL.

    >>> address("redis://:secret@10.0.0.7/3")
    Address(host='10.0.0.7', port=6379, path='', database=3, username='', password='secret', is_tls=False)
    >>> str(address("unix:///run/redis.sock?db=1"))
    '/run/redis.sock'

    Raises:
        SettingsError: another scheme, or a port or database that is no number.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"redis", "rediss", "unix"}:
        found = parts.scheme or "no scheme"
        raise SettingsError(f"redis.url has {found!r}, wanted redis://, rediss:// or unix://")
    is_unix = parts.scheme == "unix"
    database = parse_qs(parts.query).get("db", [""])[0] or (
        "" if is_unix else parts.path.strip("/")
    )
    try:
        return Address(
            host="" if is_unix else parts.hostname or "127.0.0.1",
            port=parts.port or DEFAULT_PORT,
            path=unquote(parts.path) if is_unix else "",
            database=int(database or 0),
            username=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            is_tls=parts.scheme == "rediss",
        )
    except ValueError as error:
        raise SettingsError(f"redis.url has an unusable port or database: {error}") from None


class Connection:
    """One connection: opens, authenticates and selects on entry, then answers `call` after `call`."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float | None,
        ca_file: str = "",
        cert_file: str = "",
        key_file: str = "",
    ) -> None:
        """Say where; the files are for TLS, the last two for a server that wants a certificate of us."""
        self.address = address(url)
        self._timeout_s = timeout_s
        self._ca_file, self._cert_file, self._key_file = ca_file, cert_file, key_file
        self._unread = b""

    def __enter__(self) -> Self:
        try:
            self._socket = self._connected()
        except OSError as error:
            raise StreamError(f"redis at {self.address} does not answer: {error}") from error
        self._socket.settimeout(self._timeout_s)
        try:
            self._greet()
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, *words: str | bytes) -> None:
        """Send one command."""
        try:
            self._socket.sendall(encode(*words))
        except OSError as error:
            raise StreamError(f"redis at {self.address} went away: {error}") from error

    def receive(self) -> Reply:
        """The next reply, waiting for it."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        match kind:
            case b"+":
                return Status(rest.decode(errors="replace"))
            case b"-":
                return Failure(rest.decode(errors="replace"))
            case b":":
                return int(rest)
            case b"$":
                return None if int(rest) < 0 else self._take(int(rest) + 2)[:-2]
            case b"*":
                return None if int(rest) < 0 else [self.receive() for _ in range(int(rest))]
            case _:
                raise StreamError(f"{self.address} does not speak redis: it sent {line[:40]!r}")

    def call(self, *words: str | bytes) -> Reply:
        """One command and its reply."""
        self.send(*words)
        return self.receive()

    def _connected(self) -> socket.socket:
        to = self.address
        if to.path:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            plain.settimeout(CONNECT_S)
            try:
                plain.connect(to.path)
            except OSError:
                plain.close()
                raise
            return plain
        plain = socket.create_connection((to.host, to.port), timeout=CONNECT_S)
        if not to.is_tls:
            return plain
        context = ssl.create_default_context(cafile=self._ca_file or None)
        if self._cert_file:
            context.load_cert_chain(self._cert_file, self._key_file)
        return context.wrap_socket(plain, server_hostname=to.host)

    def _greet(self) -> None:
        to = self.address
        if to.password:
            self._must("AUTH", *([to.username] if to.username else []), to.password)
        if to.database:
            self._must("SELECT", str(to.database))

    def _must(self, *words: str) -> None:
        reply = self.call(*words)
        if isinstance(reply, Failure):
            raise StreamError(f"redis at {self.address} refused {words[0]}: {reply}")

    def _line(self) -> bytes:
        while b"\r\n" not in self._unread:
            self._fill()
        line, self._unread = self._unread.split(b"\r\n", 1)
        return line

    def _take(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._fill()
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def _fill(self) -> None:
        try:
            chunk = self._socket.recv(CHUNK_BYTES)
        except OSError as error:
            raise StreamError(f"redis at {self.address} went away: {error}") from error
        if not chunk:
            raise StreamError(f"redis at {self.address} closed the connection")
        self._unread += chunk


def encode(*words: str | bytes) -> bytes:
    r"""One command as it goes over the wire.

    >>> encode("GET", "ä")
    b'*2\r\n$3\r\nGET\r\n$2\r\n\xc3\xa4\r\n'

    What a shell said that is no UTF-8 stays the bytes that it was.

    >>> encode(b"\xff".decode(errors="surrogateescape"))
    b'*1\r\n$1\r\n\xff\r\n'
    """
    parts = [
        word.encode(errors="surrogateescape") if isinstance(word, str) else word for word in words
    ]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)
