"""The one file that knows redis-py: connect, call a function, batch calls, read streams, tell the time.

Four traps of redis-py 8 are closed here: its default socket timeout of 5 s breaks blocking reads (the reading
connection has none, a bound of our own instead); it sends a command again after a lost reply (so every write goes
through a function that recognises its own repetition); and a group's read sent again would leave what the lost
reply held pending and unseen (so the reading connection never repeats, and who reads goes back to `history`); and
the 101st call at once is an error (so calls wait for one of few connections).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import msgspec
import redis.asyncio as aioredis
import redis.exceptions as weather
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff, NoBackoff

from dispatcher.streams.clock import Clock
from scheduler.errors import StreamError

FLOOR = (7, 0)
"Functions and a group's lag came with Redis 7.0; every Valkey has them."

REPLY_TIMEOUT_S = 5.0
"The longest wait for an answer that does not block on the server."

CALLS_MAX = 16
"Connections for calls; more calls at once wait their turn, which a server with one thread makes them do anyway."

READS_MAX = 1024
"Connections for reads that wait on the server: one for each read under way."

Value = str | bytes | int | float
Entry = tuple[str, dict[bytes, bytes]]
"An entry's id and fields."


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a Redis: all that `connect` needs."""

    url: str
    """`redis://`, `rediss://` (TLS), `unix://`; `redis+sentinel://host:port,host:port/<master>/<db>`;
    `redis+cluster://host:port,host:port` (`rediss+` for either with TLS)."""

    username: str | None = None
    "The ACL user; the URL's where None."

    password: str | None = None
    "Never logged; the URL's where None."

    tls_ca_file: str | None = None
    "CA bundle for TLS; the system's where None."


class Call(msgspec.Struct, frozen=True):
    """One function call: its name without `hg_`, its keys, its arguments."""

    function: str
    keys: Sequence[str]
    args: Sequence[Value]


class Connection:
    """A Redis that speaks our functions.

    Raises `StreamError` from every method where Redis is away, refuses us, or is too old.
    """

    def __init__(self, client: Any, reader: Any, shown: str) -> None:
        self._client = client
        self._reader = reader
        self._clock = Clock()
        self.shown = shown
        "The URL without its password, for messages."

    @classmethod
    async def connect(cls, where: Where) -> "Connection":
        """Connect, check the version, load our functions and learn the server's clock."""
        shown = _without_password(where.url)
        try:
            self = cls(_client(where), _client(where, is_reader=True), shown)
        except (ValueError, weather.RedisError) as error:
            raise StreamError(f"redis url {shown!r} is not usable: {error}") from None
        try:  # one door: whatever fails here, nothing stays open
            await self._check_version()
            await self._load_functions()
            await self.refresh_clock()
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Close every connection; calls under way fail."""
        for client in (self._client, self._reader):
            await client.aclose()
            pool = getattr(client, "connection_pool", None)  # a Cluster's client has one a node
            sentinels = getattr(getattr(pool, "sentinel_manager", None), "sentinels", ())
            for sentinel in sentinels:  # redis-py leaves them open
                await sentinel.aclose()

    def now(self) -> float:
        """Unix seconds on the server's clock, which is the one that stamps the entries; never goes back."""
        return self._clock.now()

    async def refresh_clock(self) -> None:
        """Measure the offset to the server's clock anew, unless that was done lately."""
        if self._clock.is_stale:
            asked_at = time.monotonic()
            seconds, micros = await self.command("TIME")
            self._clock.set(int(seconds) + int(micros) / 1e6, asked_at=asked_at)

    async def call(self, function: str, keys: Sequence[str], args: Sequence[Value]) -> Any:
        """One function call's reply."""
        [reply] = await self.batch([Call(function, keys, args)])
        if isinstance(reply, StreamError):
            raise reply
        return reply

    async def batch(self, calls: Sequence[Call]) -> list[Any]:
        """The replies of many calls in one round trip, in order; each is atomic, the batch is not.

        A call that the server refuses with an error gives that error as its reply: a `StreamError`.
        """
        if not calls:
            return []
        replies = await self._batch(calls)
        if any(_is_unknown_function(reply) for reply in replies):
            await (
                self._load_functions()
            )  # the server was restarted empty; every call may be said again
            replies = await self._batch(calls)
        return [_as_stream_error(reply, self.shown) for reply in replies]

    async def _batch(self, calls: Sequence[Call]) -> list[Any]:
        with _Weather(self.shown):
            async with self._client.pipeline(transaction=False) as pipe:
                for call in calls:
                    pipe.fcall(f"hg_{call.function}", len(call.keys), *call.keys, *call.args)
                return list(await pipe.execute(raise_on_error=False))

    async def command(self, *words: Value) -> Any:
        """Any command's reply, as redis-py shapes it."""
        with _Weather(self.shown):
            return await self._client.execute_command(*words)

    async def commands(self, many: Sequence[Sequence[Value]]) -> list[Any]:
        """The replies of many commands in one round trip, in order."""
        if not many:
            return []
        with _Weather(self.shown):
            async with self._client.pipeline(transaction=False) as pipe:
                for words in many:
                    pipe.execute_command(*words)
                return list(await pipe.execute())

    async def add(
        self, stream: str, fields: Mapping[str, Value], *, keep: int | None = None
    ) -> str:
        """Append one entry to a log (never to a work stream: a lost reply may repeat it). Returns its id."""
        with _Weather(self.shown):
            entry = await self._client.xadd(stream, dict(fields), maxlen=keep, approximate=True)
        return str(entry, "ascii")

    async def ensure_group(self, stream: str, group: str) -> None:
        """Make the stream and its group, from the stream's beginning, unless they exist."""
        with _Weather(self.shown):
            try:
                await self._client.xgroup_create(stream, group, id="0", mkstream=True)
            except weather.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def read(
        self, after: Mapping[str, str], *, count: int, block_s: float | None = None
    ) -> dict[str, list[Entry]]:
        """Entries after the given ids (`$`: only new ones), a list a stream; waits up to `block_s` for the first."""
        return await self._blocked(
            block_s,
            lambda c, block: c.xread(dict(after), count=count, block=block),
        )

    async def read_group(
        self,
        group: str,
        consumer: str,
        streams: Sequence[str],
        *,
        count: int,
        block_s: float | None,
    ) -> dict[str, list[Entry]]:
        """Entries that no consumer of the group has seen; they stay pending until acknowledged."""
        return await self._blocked(
            block_s,
            lambda c, block: c.xreadgroup(
                group, consumer, dict.fromkeys(streams, ">"), count=count, block=block
            ),
        )

    async def history(
        self, group: str, consumer: str, stream: str, *, after: str, count: int
    ) -> list[Entry]:
        """The consumer's own pending entries after an id: what it was given, also in a reply that was lost."""
        with _Weather(self.shown):
            reply = await self._client.xreadgroup(group, consumer, {stream: after}, count=count)
        return _streams(reply).get(stream, [])

    async def newest(self, stream: str, *, after: str, count: int) -> list[Entry]:
        """The newest entries after an id, at most `count`, oldest first."""
        with _Weather(self.shown):
            found = await self._client.xrevrange(stream, "+", f"({after}", count=count)
        return _entries(found)[::-1]

    async def hashes(self, keys: Sequence[str], fields: Sequence[str]) -> list[list[bytes | None]]:
        """These fields of each hash, in one round trip."""
        return await self.commands([("HMGET", key, *fields) for key in keys])

    async def consumers(self, stream: str, group: str) -> dict[str, tuple[int, float]]:
        """Every consumer of the group: how many entries it holds, and for how many seconds it was silent."""
        with _Weather(self.shown):
            rows = await self._client.xinfo_consumers(stream, group)
        return {
            str(row["name"], "utf-8"): (int(row["pending"]), int(row["idle"]) / 1e3) for row in rows
        }

    async def delivered(self, stream: str, group: str) -> str:
        """The last entry that was given to any consumer of the group."""
        with _Weather(self.shown):
            groups = await self._client.xinfo_groups(stream)
        found = next(row for row in groups if row["name"] == group.encode())
        return str(found["last-delivered-id"], "ascii")

    async def oldest_pending(self, stream: str, group: str) -> str:
        """The oldest entry that some consumer holds; empty: none."""
        with _Weather(self.shown):
            summary = await self._client.xpending(stream, group)
        return str(summary["min"] or b"", "ascii")

    async def take(
        self, stream: str, group: str, consumer: str, *, other: str, count: int
    ) -> list[Entry]:
        """Take over another consumer's pending entries, the oldest `count`."""
        with _Weather(self.shown):
            rows = await self._client.xpending_range(
                stream, group, "-", "+", count, consumername=other
            )
            ids = [row["message_id"] for row in rows]
            if not ids:
                return []
            return _entries(await self._client.xclaim(stream, group, consumer, 0, ids))

    async def entries(
        self, stream: str, first: str = "-", last: str = "+", *, count: int | None = None
    ) -> list[Entry]:
        """Entries from `first` to `last`, both included, oldest first."""
        with _Weather(self.shown):
            return _entries(await self._client.xrange(stream, first, last, count=count))

    async def claim(
        self, stream: str, group: str, consumer: str, *, start: str, count: int
    ) -> tuple[str, list[Entry]]:
        """Take over pending entries of every consumer, from `start`; the cursor to go on from (`0-0`: all done)."""
        with _Weather(self.shown):
            reply = await self._client.xautoclaim(
                stream, group, consumer, min_idle_time=0, start_id=start, count=count
            )
        return str(reply[0], "ascii"), _entries(reply[1])

    async def memory(self) -> dict[str, Any]:
        """What the server says of its memory; of one node, where there are several."""
        with _Weather(self.shown):
            info = await self._client.info("memory")
        return dict(info if "used_memory" in info else next(iter(info.values())))

    async def _blocked(self, block_s: float | None, ask: Any) -> dict[str, list[Entry]]:
        if block_s is None:
            with _Weather(self.shown):
                return _streams(await ask(self._client, None))
        with _Weather(self.shown):
            async with asyncio.timeout(
                block_s + REPLY_TIMEOUT_S
            ):  # a frozen server must not hold us for ever
                return _streams(await ask(self._reader, max(1, round(block_s * 1000))))

    async def _check_version(self) -> None:
        with _Weather(self.shown):
            info = await self._client.info("server")
        info = (
            next(iter(info.values())) if "redis_version" not in info else info
        )  # a cluster answers by node
        found = str(info["redis_version"])
        if tuple(int(part) for part in found.split(".")[:2]) < FLOOR:
            raise StreamError(f"redis at {self.shown} is {found}, wanted 7.0 or newer")

    async def _load_functions(self) -> None:
        code = resources.files("dispatcher.streams").joinpath("functions.lua").read_text()
        with _Weather(self.shown):
            try:
                await self._client.function_load(code, replace=True)
            except weather.NoPermissionError:
                # Where ACL users are told apart only a dispatcher may load, since functions run with their
                # caller's rights. Until one has, every call says "Function not found".
                return


class _Weather:
    """Turns what redis-py raises into `StreamError`, and keeps a cancellation that it swallows.

    redis-py sends under `asyncio.wait_for`, which before Python 3.12 loses a cancellation that comes in the same
    turn of the loop as the end of the send: the task would then go on as if nobody had asked it to end.
    """

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._asked = 0

    def __enter__(self) -> None:
        self._asked = _times_cancelled()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if _times_cancelled() > self._asked and not isinstance(error, asyncio.CancelledError):
            raise asyncio.CancelledError from error
        if isinstance(error, weather.RedisError | TimeoutError | OSError):
            raise StreamError(f"redis at {self._shown}: {error or kind}") from error


def _times_cancelled() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _is_unknown_function(reply: Any) -> bool:
    return isinstance(reply, weather.ResponseError) and "Function not found" in str(reply)


def _as_stream_error(reply: Any, shown: str) -> Any:
    return StreamError(f"redis at {shown}: {reply}") if isinstance(reply, Exception) else reply


def _streams(reply: Any) -> dict[str, list[Entry]]:
    """Both shapes of a read's reply: pairs (RESP2) and a map (RESP3)."""
    if not reply:
        return {}
    named = reply.items() if isinstance(reply, dict) else reply
    return {str(name, "utf-8"): _entries(entries) for name, entries in named}


def _entries(reply: Any) -> list[Entry]:
    if (
        reply
        and isinstance(reply[0], list)
        and (not reply[0] or isinstance(reply[0][0], list | tuple))
    ):
        reply = reply[0]  # RESP3 nests a stream's entries once more
    return [(str(entry, "ascii"), fields) for entry, fields in reply if fields is not None]


def _client(where: Where, *, is_reader: bool = False) -> Any:
    """A client for the URL; the reader's waits without a timeout and never repeats."""
    url = urlsplit(where.url)
    retry = Retry(NoBackoff(), 0) if is_reader else Retry(ExponentialBackoff(cap=0.5, base=0.02), 3)
    options: dict[str, Any] = {
        "socket_timeout": None if is_reader else REPLY_TIMEOUT_S,
        "socket_connect_timeout": REPLY_TIMEOUT_S,
        "retry": retry,
        "health_check_interval": 0,
        "max_connections": READS_MAX,
    }
    if where.username is not None:
        options["username"] = where.username
    if where.password is not None:
        options["password"] = where.password
    is_secure = url.scheme.startswith("rediss")
    if is_secure and where.tls_ca_file is not None:
        options["ssl_ca_certs"] = where.tls_ca_file
    kind = url.scheme.removeprefix("rediss").removeprefix("redis")
    if kind in ("+sentinel", "+cluster"):
        several = _sentinel if kind == "+sentinel" else _cluster
        return several(url.netloc, url.path, options | ({"ssl": True} if is_secure else {}))
    if url.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(
            f"scheme is {url.scheme!r}, wanted redis, rediss, unix, redis+sentinel or redis+cluster"
        )
    if is_reader:
        return aioredis.Redis.from_url(where.url, **options)
    pool = aioredis.BlockingConnectionPool.from_url(
        where.url, timeout=REPLY_TIMEOUT_S, **options | {"max_connections": CALLS_MAX}
    )
    return aioredis.Redis.from_pool(pool)


def _cluster(netloc: str, _path: str, options: dict[str, Any]) -> Any:
    auth, hosts = _hosts(netloc)
    nodes = [ClusterNode(host, port) for host, port in hosts]
    return RedisCluster(startup_nodes=nodes, **(auth | options))


def _sentinel(netloc: str, path: str, options: dict[str, Any]) -> Any:
    auth, hosts = _hosts(netloc)
    name, _, db = path.strip("/").partition("/")
    if not name:
        raise ValueError("it names no master: wanted redis+sentinel://host:port/<master>[/<db>]")
    watch = {"socket_timeout": REPLY_TIMEOUT_S, "socket_connect_timeout": REPLY_TIMEOUT_S}
    sentinel: Any = Sentinel  # redis-py leaves it untyped
    return sentinel(hosts, sentinel_kwargs=watch).master_for(
        name, db=int(db or 0), **(auth | options)
    )


def _hosts(netloc: str) -> tuple[dict[str, str], list[tuple[str, int]]]:
    """User and password, and the hosts, of `user:password@host:port,host:port`."""
    login, _, rest = netloc.rpartition("@")
    user, _, password = login.partition(":")
    auth = {key: word for key, word in (("username", user), ("password", password)) if word}
    hosts = []
    for part in rest.split(","):
        host, _, port = part.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"host is {part!r}, wanted host:port")
        hosts.append((host.strip("[]"), int(port)))
    return auth, hosts


def _without_password(url: str) -> str:
    """The URL as it may be shown.

    >>> _without_password("redis://me:secret@h:6379/0")
    'redis://me:***@h:6379/0'
    """
    parts = urlsplit(url)
    login, at, rest = parts.netloc.rpartition("@")
    user, colon, _ = login.partition(":")
    return parts._replace(netloc=f"{user}{colon}{'***' if colon else ''}{at}{rest}").geturl()
