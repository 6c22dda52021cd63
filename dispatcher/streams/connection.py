"""A Redis that speaks our functions: connect, call one, batch calls, read streams, tell the time.

What is frequent, calls and the reads that wait, goes over pipes of our own where the server can be reached by one
(see `pipe`); all else, and everything over TLS, Sentinel and Cluster, over redis-py.

Four traps of redis-py 8 are closed here: its default socket timeout of 5 s breaks blocking reads (the reading
connection has none, a bound of our own instead); it sends a command again after a lost reply (so every write goes
through a function that recognises its own repetition); and a group's read sent again would leave what the lost
reply held pending and unseen (so the reading connection never repeats, and who reads goes back to `history`); and
the 101st call at once is an error (so calls wait for one of few connections).
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import redis.exceptions

from dispatcher.streams import greeting, replies
from dispatcher.streams.clock import READINGS, Clock, Reading
from dispatcher.streams.pipe import Address, Begun, Pipe, Words
from dispatcher.streams.replies import Entry, Read
from dispatcher.streams.weather import (
    Trouble,
    Weather,
    as_stream_error,
    is_complaint,
    is_unknown_function,
)
from dispatcher.streams.where import REPLY_TIMEOUT_S, Where, client, without_password
from scheduler.errors import StreamError

__all__ = ("Begun", "Call", "Came", "Connection", "Entry", "Read", "Value", "Where")

PREFIX = "hg7_"
"What our functions' names begin with: the number is the calling convention of functions.lua."

AGAIN_S = (0.0, 0.02, 0.1)
"Before a batch is said again over a new connection; who must wait longer does so by himself."

Value = str | bytes | int | float

Came = Callable[[Read], None]
"Told of what a read brought."


class Call(msgspec.Struct, frozen=True):
    """One function call: its name without the prefix, its keys, its arguments."""

    function: str
    keys: Sequence[str]
    args: Sequence[Value]


class Connection:
    """A Redis that speaks our functions.

    Raises `StreamError` from every method where Redis is away, refuses us, or is too old.
    """

    def __init__(self, client: Any, reader: Any, shown: str, address: Address | None) -> None:
        self._client = client
        self._reader = reader
        self._address = address
        "None: only redis-py can reach it."
        self._calls = Pipe(address) if address is not None else None
        self._idle: list[Pipe] = []
        "Pipes for reads that wait on the server, one for each under way at once."
        self._reading: set[Pipe] = set()
        self._clock = Clock()
        self.shown = shown
        "The URL without its password, for messages."
        self._trouble = Trouble(shown)

    @classmethod
    async def connect(cls, where: Where) -> "Connection":
        """Connect, check the version, load our functions and learn the server's clock."""
        shown = without_password(where.url)
        try:
            self = cls(client(where), client(where, is_reader=True), shown, Address.of(where))
        except (ValueError, redis.exceptions.RedisError) as error:
            raise StreamError(f"redis url {shown!r} is not usable: {error}") from None
        try:  # one door: whatever fails here, nothing stays open
            await greeting.check_version(self._client, shown)
            await greeting.load_functions(self._client, shown)
            await self.refresh_clock()
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        """Close every connection; calls under way fail."""
        for pipe in (*self._idle, *self._reading, *([self._calls] if self._calls else [])):
            pipe.close()
        for one in (self._client, self._reader):
            await one.aclose()
            pool = getattr(one, "connection_pool", None)  # a Cluster's client has one a node
            sentinels = getattr(getattr(pool, "sentinel_manager", None), "sentinels", ())
            for sentinel in sentinels:  # redis-py leaves them open
                await sentinel.aclose()

    def now(self) -> float:
        """Unix seconds on the server's clock, which is the one that stamps the entries; never goes back."""
        return self._clock.now()

    async def refresh_clock(self) -> None:
        """Measure the offset to the server's clock anew, unless that was done lately."""
        if self._clock.is_stale:
            self._clock.set([await self._time() for _ in range(READINGS)])

    async def _time(self) -> Reading:
        asked_at = time.monotonic()
        seconds, micros = await self.command("TIME")
        return Reading(int(seconds) + int(micros) / 1e6, asked_at, time.monotonic())

    async def call(self, function: str, keys: Sequence[str], args: Sequence[Value]) -> Any:
        """One function call's reply."""
        [reply] = await self.batch([Call(function, keys, args)])
        if isinstance(reply, StreamError):
            raise reply
        return reply

    def begin(self, calls: Sequence[Call]) -> Begun | None:
        """Send these calls now, before any other task has its turn, to be given to `batch` with them.

        None: there is no open pipe, and nothing was sent; `batch` will.
        """
        if self._calls is None or not calls:
            return None
        return self._calls.begin(list(map(_words, calls)))

    def extend(self, begun: Begun, calls: Sequence[Call]) -> bool:
        """Send these behind what was begun, to be given to `batch` at its end; False: it is too late, nothing was sent.

        In a write of their own: the server, if it is quick enough, answers everybody else before it looks at them.
        """
        return self._calls is not None and self._calls.extend(begun, list(map(_words, calls)))

    async def batch(self, calls: Sequence[Call], begun: Begun | None = None) -> list[Any]:
        """The replies of many calls in one round trip, in order; each is atomic, the batch is not.

        A call that the server refuses with an error gives that error as its reply: a `StreamError`.
        """
        if not calls:
            return []
        found = await self._batch(calls, begun)
        errors = [reply for reply in found if isinstance(reply, Exception)]
        if not errors:
            return found
        if any(is_unknown_function(error) for error in errors):
            # The server was restarted empty; every call may be said again.
            await greeting.load_functions(self._client, self.shown)
            found = await self._batch(calls)
        return [as_stream_error(reply, self.shown) for reply in found]

    async def _batch(self, calls: Sequence[Call], begun: Begun | None = None) -> list[Any]:
        if self._calls is not None:
            with self._trouble:
                try:
                    if begun is not None:
                        return await self._calls.replies(begun, limit_s=REPLY_TIMEOUT_S)
                except ConnectionError:
                    pass  # lost with their replies: they are said again
                return await _insisted(self._calls, [_words(call) for call in calls])
        with Weather(self.shown):
            async with self._client.pipeline(transaction=False) as pipe:
                for call in calls:
                    pipe.execute_command(*_words(call))
                found = list(await pipe.execute(raise_on_error=False))
            for reply in found:
                if isinstance(reply, Exception) and not is_complaint(reply):
                    raise reply  # a Cluster's client gives it as a call's reply: nobody knows what came of that
        return found

    async def command(self, *words: Value) -> Any:
        """Any command's reply, as redis-py shapes it."""
        with Weather(self.shown):
            return await self._client.execute_command(*words)

    async def commands(self, many: Sequence[Sequence[Value]]) -> list[Any]:
        """The replies of many commands in one round trip, in order."""
        if not many:
            return []
        with Weather(self.shown):
            async with self._client.pipeline(transaction=False) as pipe:
                for words in many:
                    pipe.execute_command(*words)
                return list(await pipe.execute())

    async def add(self, stream: str, fields: Mapping[str, Value]) -> str:
        """Append one entry to a log (never to a work stream: a lost reply may repeat it). Returns its id."""
        with Weather(self.shown):
            entry = await self._client.xadd(stream, dict(fields))
        return str(entry, "ascii")

    async def ensure_group(self, stream: str, group: str) -> None:
        """Make the stream and its group, from the stream's beginning, unless they exist."""
        with Weather(self.shown):
            try:
                await self._client.xgroup_create(stream, group, id="0", mkstream=True)
            except redis.exceptions.ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def read(
        self,
        after: Mapping[str, str],
        *,
        count: int,
        block_s: float | None = None,
        came: Came | None = None,
    ) -> Read:
        """Entries after the given ids (`$`: only new ones), a list a stream; waits up to `block_s` for the first.

        Where that waits, `came` gets what is returned first: before any task has its turn, over a pipe.
        """
        if block_s is None:
            with Weather(self.shown):
                return replies.streams(await self._client.xread(dict(after), count=count))
        words: Words = (
            "XREAD",
            "COUNT",
            count,
            "BLOCK",
            _block_ms(block_s),
            "STREAMS",
            *after,
            *after.values(),
        )
        return await self._waited(words, block_s, came)

    async def read_group(
        self,
        group: str,
        consumer: str,
        streams: Sequence[str],
        *,
        count: int,
        block_s: float | None,
        came: Came | None = None,
    ) -> Read:
        """Entries that no consumer of the group has seen; they stay pending until acknowledged. `came`: as `read`."""
        if block_s is None:
            with Weather(self.shown):
                news = dict.fromkeys(streams, ">")
                return replies.streams(
                    await self._client.xreadgroup(group, consumer, news, count=count)
                )
        head = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count, "BLOCK", _block_ms(block_s))
        return await self._waited(
            (*head, "STREAMS", *streams, *(">" for _ in streams)), block_s, came
        )

    async def history(
        self, group: str, consumer: str, stream: str, *, after: str, count: int
    ) -> list[Entry]:
        """The consumer's own pending entries after an id: what it was given, also in a reply that was lost."""
        with Weather(self.shown):
            reply = await self._client.xreadgroup(group, consumer, {stream: after}, count=count)
        return replies.streams(reply).get(stream, [])

    async def newest(self, stream: str, *, after: str, count: int) -> list[Entry]:
        """The newest entries after an id, at most `count`, oldest first."""
        with Weather(self.shown):
            found = await self._client.xrevrange(stream, "+", f"({after}", count=count)
        return replies.entries(found)[::-1]

    async def hashes(self, keys: Sequence[str], fields: Sequence[str]) -> list[list[bytes | None]]:
        """These fields of each hash, in one round trip."""
        many: list[Words] = [("HMGET", key, *fields) for key in keys]
        if self._calls is None:
            return await self.commands(many)
        with self._trouble:
            found = await _insisted(self._calls, many)
        for reply in found:
            if isinstance(reply, Exception):
                raise as_stream_error(reply, self.shown)
        return found

    async def consumers(self, stream: str, group: str) -> dict[str, tuple[int, float]]:
        """Every consumer of the group: how many entries it holds, and for how many seconds it was silent."""
        with Weather(self.shown):
            rows = await self._client.xinfo_consumers(stream, group)
        return {
            str(row["name"], "utf-8"): (int(row["pending"]), int(row["idle"]) / 1e3) for row in rows
        }

    async def delivered(self, stream: str, group: str) -> str:
        """The last entry that was given to any consumer of the group."""
        with Weather(self.shown):
            groups = await self._client.xinfo_groups(stream)
        for row in groups:
            if row["name"] == group.encode():
                return str(row["last-delivered-id"], "ascii")
        raise StreamError(f"redis at {self.shown}: {stream} has lost its group {group!r}")

    async def oldest_pending(self, stream: str, group: str) -> str:
        """The oldest entry that some consumer holds; empty: none."""
        with Weather(self.shown):
            summary = await self._client.xpending(stream, group)
        return str(summary["min"] or b"", "ascii")

    async def take(
        self, stream: str, group: str, consumer: str, *, other: str, count: int
    ) -> list[Entry]:
        """Take over another consumer's pending entries, the oldest `count`."""
        with Weather(self.shown):
            rows = await self._client.xpending_range(
                stream, group, "-", "+", count, consumername=other
            )
            ids = [row["message_id"] for row in rows]
            if not ids:
                return []
            return replies.entries(await self._client.xclaim(stream, group, consumer, 0, ids))

    async def entries(
        self, stream: str, first: str = "-", last: str = "+", *, count: int | None = None
    ) -> list[Entry]:
        """Entries from `first` to `last`, both included, oldest first."""
        with Weather(self.shown):
            return replies.entries(await self._client.xrange(stream, first, last, count=count))

    async def some(self, stream: str, ids: Sequence[str]) -> list[Entry]:
        """These entries, in one round trip; those that are trimmed are left out."""
        found = await self.commands([("XRANGE", stream, one, one) for one in ids])
        return [entry for reply in found for entry in replies.entries(reply)]

    async def claim(
        self, stream: str, group: str, consumer: str, *, start: str, count: int
    ) -> tuple[str, list[Entry]]:
        """Take over pending entries of every consumer, from `start`; the cursor to go on from (`0-0`: all done)."""
        with Weather(self.shown):
            reply = await self._client.xautoclaim(
                stream, group, consumer, min_idle_time=0, start_id=start, count=count
            )
        return str(reply[0], "ascii"), replies.entries(reply[1])

    async def life(self) -> str:
        """Which life of which server answers; empty of a Cluster, whose nodes come and go."""
        with Weather(self.shown):
            info = await self._client.info("server")
        return str(info.get("run_id", ""))

    async def memory(self) -> dict[str, Any]:
        """What the server says of its memory; of one node, where there are several."""
        with Weather(self.shown):
            info = await self._client.info("memory")
        return dict(info if "used_memory" in info else next(iter(info.values())))

    async def _waited(self, words: Words, block_s: float, came: Came | None) -> Read:
        """The reply to a read that waits on the server; never asked twice, whatever becomes of it."""
        limit_s = block_s + REPLY_TIMEOUT_S  # a frozen server must not hold us for ever
        read: Read = {}
        if self._address is None:
            with Weather(self.shown):
                async with asyncio.timeout(limit_s):
                    read = replies.streams(await self._reader.execute_command(*words))
            if came is not None:
                came(read)
            return read

        def told(said: list[Any]) -> None:
            nonlocal read
            if not isinstance(said[0], Exception):
                read = replies.plain(said[0])
                if came is not None:
                    came(read)

        pipe = self._idle.pop() if self._idle else Pipe(self._address)
        self._reading.add(pipe)
        try:
            with self._trouble:
                [reply] = await pipe.ask([words], limit_s=limit_s, came=told)
        except BaseException:
            pipe.close()  # what it still brings is nobody's
            raise
        finally:
            self._reading.discard(pipe)
        self._idle.append(pipe)
        if isinstance(reply, Exception):
            raise as_stream_error(reply, self.shown)
        return read


async def _insisted(pipe: Pipe, many: Sequence[Words]) -> list[Any]:
    """Ask again after a lost connection: every function recognises its own repetition."""
    for pause_s in AGAIN_S:
        try:
            return await pipe.ask(many, limit_s=REPLY_TIMEOUT_S)
        except TimeoutError:
            raise
        except OSError:
            await asyncio.sleep(pause_s)
    return await pipe.ask(many, limit_s=REPLY_TIMEOUT_S)


def _words(call: Call) -> Words:
    return ("FCALL", f"{PREFIX}{call.function}", len(call.keys), *call.keys, *call.args)


def _block_ms(block_s: float) -> int:
    return max(1, round(block_s * 1000))  # 0 would wait for ever
