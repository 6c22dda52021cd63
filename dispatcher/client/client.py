"""Requests from Python: submit, wait, stream, cancel, attach again after a crash."""

import asyncio
import contextlib
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

from dispatcher import local, options
from dispatcher.client import prompt as prompts
from dispatcher.client.awaited import Awaited
from dispatcher.client.follower import Follower
from dispatcher.client.handle import Handle
from dispatcher.client.prompt import Body, Tokenizer
from dispatcher.client.records import Records
from dispatcher.client.standing import Standing, standing
from dispatcher.client.wishes import Wishes
from dispatcher.options import Options
from dispatcher.streams import producer
from dispatcher.streams.connection import Connection, Where
from scheduler import prefix, servable
from scheduler.errors import RequestRejected, StreamError, UnknownRequestError, WireError
from scheduler.keys import Keys
from scheduler.settings import LimitSettings, LoopSettings, Settings
from scheduler.wire.client import Request
from scheduler.wire.words import PATHS
from scheduler.wire.worker import Result

BATCH = 128
"Requests sent in one round trip: a longer pipeline gains nothing and delays the others."

FULL_RETRY_S = 1.0
"What a full queue tells a client: long enough for a fleet to finish some, short enough to be fair to who asks."

T = TypeVar("T")

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class Client:
    """A pool's client.

    1. `async with Client(...)` connects and begins to read its own reply stream, `results:<name>`.
    2. `submit` appends the request, once whatever happens to the reply; the promise's clock starts there.
    3. The terminal record comes on the reply stream and resolves the handle.
    4. Leaving ends the reading, not the requests: `attach(id)` finds them again, from any process.
    """

    def __init__(
        self,
        *,
        redis: str | Where,
        pool: str = "default",
        prefix: str = "hg",
        name: str | None = None,
        limits: LimitSettings | None = None,
        tokenizer: Tokenizer | None = None,
        kept_s: float = LoopSettings().retention_s,
    ) -> None:
        """Say where; nothing is connected yet.

        Args:
            redis: `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`.
            pool: the pool to send to.
            prefix: what every key begins with.
            name: names the reply stream and begins the ids; default host, process and four random digits.
            limits: how long a body may be, and how many may wait.
            tokenizer: counts prompts exactly; default 4 bytes a token.
            kept_s: how long records stay on the reply stream; not less than the dispatcher's retention.
        """
        self.keys = Keys(prefix, pool)
        self.name = name or _own_name()
        self._where = redis if isinstance(redis, Where) else Where(url=redis)
        self._limits = limits or LimitSettings()
        self._tokenizer = tokenizer
        self._kept_s = 1.1 * kept_s  # the request's hash, which points there, must go first
        self._sent = 0
        self._connection: Connection | None = None
        self._follower: Follower | None = None
        self._records: Records | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_settings(cls, settings: Settings, *, name: str | None = None) -> Self:
        """A client for the pool that these settings describe; a private server that runs is found."""
        where = Where.of(settings.redis, url=local.known_url(settings.redis))
        return cls(
            redis=where,
            pool=settings.pool,
            prefix=settings.redis.prefix,
            name=name,
            limits=settings.limits,
            kept_s=settings.loop.retention_s,
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, name: str | None = None) -> Self:
        """A client from HEADGATE_… variables and the settings file they name."""
        return cls.from_settings(
            options.settings(Options(), os.environ if environ is None else environ), name=name
        )

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._connection = await Connection.connect(self._where)
        self._follower = Follower(self._connection)
        own = self.keys.reply(self.name)
        self._records = Records(
            self._connection, self.keys, own, self._follower, kept_s=self._kept_s
        )
        self._records.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Each of them, whatever becomes of the others; the last named ends first.
        async with contextlib.AsyncExitStack() as ends:
            ends.callback(self._disconnected)
            ends.push_async_callback(self.connection.close)
            ends.push_async_callback(self.follower.close)
            ends.push_async_callback(self.records.close)

    def _disconnected(self) -> None:
        """Closed connections would open again for whoever asked them."""
        self._connection = self._follower = self._records = None

    @property
    def connection(self) -> Connection:
        """The Redis it uses."""
        if self._connection is None:
            raise StreamError("the client is not connected, wanted `async with Client(...)`")
        return self._connection

    @property
    def follower(self) -> Follower:
        """Its stream readers."""
        if self._follower is None:
            raise StreamError("the client is not connected, wanted `async with Client(...)`")
        return self._follower

    @property
    def records(self) -> Records:
        """What it waits for."""
        if self._records is None:
            raise StreamError("the client is not connected, wanted `async with Client(...)`")
        return self._records

    def request(self, body: Body, **wishes: Unpack[Wishes]) -> Request:
        """The request as it will be sent, checked; nothing is sent.

        Raises:
            WireError: no dispatcher could serve it; names the field, the value found and the value wanted.
        """
        read = prompts.parsed(body)
        prompt = prompts.prompt(read, self._tokenizer)
        named = wishes.get("model") or read.get("model")
        if not isinstance(named, str) or not named:
            raise WireError(f"field 'model' is {named!r}, wanted a name, here or in the body")
        guessed: Wishes = {
            "model": named,
            "id": self._next_id(),
            "path": PATHS[1] if "prompt" in read else PATHS[0],
            "stream": bool(read.get("stream")),
        }
        request = Request(
            body=prompts.encoded(body),
            reply_to=self.keys.reply(self.name),
            prompt_tokens=prompts.length(prompt),
            prompt_estimated=isinstance(prompt, str),
            blocks=prefix.blocks(prompt),
            **(guessed | wishes),
        )
        if not request.id:
            raise WireError("field 'id' is '', wanted one, or none given so that one is made")
        servable.check(request, body_bytes=self._limits.body_bytes, reply_root=self.keys.results)
        return request

    async def submit(self, body: Body, **wishes: Unpack[Wishes]) -> Handle:
        """Enqueue one request.

        An `id` that exists already is not sent again: the handle is that request's.

        Raises:
            RequestRejected: too many wait; `retry_after_s` says when to come back.
            WireError: as `request`.
            StreamError: Redis is away; send it again under the same id, it will be there once.
        """
        [handle] = await self._send([self.request(body, **wishes)])
        if isinstance(handle, RequestRejected):
            raise handle
        return handle

    async def submit_many(self, requests: Iterable[Request | Body]) -> list[Handle]:
        """Enqueue many in few round trips; a body stands for `request(body)`.

        A request for which there is no room is not raised here: its handle ends as `rejected`.
        """
        handles = []
        for batch in _batches(requests, BATCH):
            built = [one if isinstance(one, Request) else self.request(one) for one in batch]
            for request, handle in zip(built, await self._send(built), strict=True):
                handles.append(
                    self._turned_away(request, handle)
                    if isinstance(handle, RequestRejected)
                    else handle
                )
        return handles

    async def results(self, handles: Iterable[Handle]) -> AsyncIterator[Handle]:
        """These handles in the order in which they end."""
        ended: asyncio.Queue[Handle] = asyncio.Queue()
        waiting = list(handles)
        for handle in waiting:
            handle.when_done(ended.put_nowait)
        for _ in waiting:
            yield await ended.get()

    async def attach(self, request_id: str) -> Handle:
        """The handle of a request that was sent before, by whomever.

        Raises:
            UnknownRequestError: there is no such request, or its record is no longer kept.
        """
        ended = self.records.expect(request_id)
        handle = Handle(self, request_id, ended)
        handle.is_found = True
        await self._seek(request_id)
        return handle

    async def cancel(self, request_id: str, *, reason: str = "") -> bool:
        """Ask for a request's end; False: it had ended already.

        Raises:
            UnknownRequestError: there is no such request.
        """
        call = producer.cancel(self.keys, request_id, reason=reason)
        reply = await self.connection.call(call.function, call.keys, call.args)
        if reply < 0:
            raise UnknownRequestError(f"request {request_id!r} is not known in {self.keys.root}")
        return bool(reply)

    async def status(self, request_id: str) -> Standing:
        """Where a request stands.

        Raises:
            UnknownRequestError: there is no such request, or it ended too long ago.
        """
        raw = await self.connection.command("HGETALL", self.keys.request(request_id))
        if raw:
            return standing(request_id, raw)
        if await self.records.is_unread(request_id):
            return Standing(id=request_id, state="queued", entry=request_id)
        raise UnknownRequestError(f"request {request_id!r} is not known in {self.keys.root}")

    async def _send(self, requests: Sequence[Request]) -> list[Handle | RequestRejected]:
        if self._loop is not asyncio.get_running_loop() and self._connection is not None:
            raise StreamError("the client is used on another event loop, wanted one a loop")
        now = self.connection.now()
        calls = [
            producer.submit(
                self.keys,
                request,
                now=now,
                waiting_max=self._limits.queued_max,
                body_ttl_s=self._limits.body_ttl_s,
                inline_bytes=self._limits.inline_bytes,
            )
            for request in requests
        ]
        begun = self.connection.begin(calls)  # before all else: the promise's clock starts there
        fresh = [r.id for r in requests if not self.records.is_expected(r.id)]
        handles = [Handle(self, r.id, self.records.expect(r.id)) for r in requests]
        try:
            replies = await self.connection.batch(calls, begun)
        except BaseException:
            for request_id in fresh:
                self.records.forget(request_id)
            raise
        answered = [
            self._answered(handle, reply) for handle, reply in zip(handles, replies, strict=True)
        ]
        await self._seek_all([handle.id for handle in handles if handle.is_found])
        return answered

    def _answered(self, handle: Handle, reply: object) -> Handle | RequestRejected:
        if isinstance(reply, StreamError):
            self.records.forget(handle.id)
            raise reply
        assert isinstance(reply, list)
        code, what = reply
        if code > 0:
            self.records.sent(handle.id)
        handle.is_found = code == 0
        if code < 0:
            self.records.forget(handle.id)
            return RequestRejected(
                handle.id, f"{what} requests wait already", retry_after_s=FULL_RETRY_S
            )
        return handle

    async def _seek_all(self, ids: Sequence[str]) -> None:
        """Each is some looks at Redis: together, or a batch that goes on would crawl over what it had sent before."""
        if len(ids) == 1:
            await self._seek(ids[0])
        elif ids:
            found = await asyncio.gather(*map(self._seek, ids), return_exceptions=True)
            for error in found:
                if error is not None:
                    raise error

    async def _seek(self, request_id: str) -> None:
        try:
            found = await self.status(request_id)
            await self.records.seek(found)
            # It may have ended between the two looks.
            if found.state != "terminal":
                found = await self.status(request_id)
                if found.state == "terminal":
                    await self.records.seek(found)
        except UnknownRequestError:
            self.records.forget(request_id)
            raise

    def _turned_away(self, request: Request, error: RequestRejected) -> Handle:
        record = Result(
            id=request.id,
            outcome="rejected",
            reason=error.reason,
            retry_after_s=error.retry_after_s,
        )
        return Handle(self, request.id, Awaited(record), is_turned_away=True)

    def _next_id(self) -> str:
        self._sent += 1
        return f"{self.name}.{self._sent}"


def _own_name() -> str:
    host = _NO_NAME.sub("-", socket.gethostname())[:40].strip("-._") or "client"
    return f"{host}-{os.getpid()}-{secrets.token_hex(2)}"


def _batches(items: Iterable[T], size: int) -> Iterable[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
