"""The engine's KV events as they come over ZeroMQ, complete and in order, or not at all.

vLLM publishes numbered messages and keeps the last ones for who missed some (`replay_endpoint`).

    1. subscribe, and ask for all that is still kept
    2. message after message goes to the mirror
    3. a number is missing: ask for it; where it is not to be had the mirror begins anew
    4. numbers begin anew: another engine publishes there, and its cache was empty
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit

import msgspec
import structlog
import zmq
import zmq.asyncio

from scheduler.errors import UNREADABLE, WireError
from workers import kv_events
from workers.kv_mirror import Mirror

REPLAY_S = 2.0
"How long the engine may take for each message of a replay; it looks for the question ten times a second."

LIST_S = 30.0
"How often all is told anew: so long a new dispatcher, or one that missed a beat, goes by its own beliefs."

WAITING_MAX = 100_000
"Messages that may wait for us, as vLLM's own limit; then they are lost, and asked for. No replay has more."

AGAIN_S = (0.1, 0.5, 2.0, 10.0)
"Before it is listened again where ZeroMQ failed, as it does without a free file; the last one for as long as it takes."

END = (-1).to_bytes(8, "big", signed=True)
"The number of the message that ends a replay."

log = structlog.get_logger()


class Source(msgspec.Struct, frozen=True):
    """Where an engine publishes."""

    events: str
    "As ZeroMQ connects to it, such as tcp://127.0.0.1:5557."

    replay: str = ""
    "Where past messages can be asked for; empty: nowhere."

    topic: str = ""
    "What its messages begin with."


class _Message(msgspec.Struct, frozen=True):
    seq: int
    moment: float
    "When it was made, by the engine's clock; 0: it cannot be read."
    events: list[kv_events.KvEvent] | None
    "None: it cannot be read."


class Feed:
    """Keeps one mirror true to one engine. `run` is its task."""

    def __init__(self, mirror: Mirror, *, name: str) -> None:
        """`name` is the endpoint's, for the log."""
        self._mirror, self._name = mirror, name
        self._source: Source | None = None
        self._turned = asyncio.Event()
        self._next = 0
        "The number that comes next."
        self._moment = 0.0
        "When the last message was made, by the engine's clock."

    def turn_to(self, source: Source | None) -> None:
        """The engine has come, and publishes there; None: it does not."""
        self._source = source
        self._turned.set()

    async def run(self) -> None:
        """Listen for ever."""
        heard: Source | None = None
        while True:
            self._turned.clear()
            source = self._source
            if source != heard:
                self._mirror.clear(is_empty=False)
                self._next, self._moment = 0, 0.0
            heard = source
            listening = asyncio.ensure_future(self._listen(source)) if source else None
            try:
                await self._turned.wait()
            finally:
                if listening is not None:
                    listening.cancel()
                    # Not `await listening`: its cancel and one of our own could not be told apart.
                    await asyncio.wait([listening])
                    if not listening.cancelled():
                        listening.result()  # a bug of ours is not to be silent

    async def _listen(self, source: Source) -> None:
        log.info("kv_events", endpoint=self._name, source=source.events, replay=source.replay)
        for tries in itertools.count():
            try:
                await self._hear_out(source)
            except zmq.ZMQError as error:
                if tries & (tries - 1) == 0:  # ever more rarely: an hour of it is a dozen lines
                    log.warning("kv_events_lost", endpoint=self._name, reason=f"{source}: {error}")
            await asyncio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])

    async def _hear_out(self, source: Source) -> None:
        with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, WAITING_MAX)
            socket.setsockopt(zmq.SUBSCRIBE, source.topic.encode())
            socket.connect(source.events)
            if not await self._is_same(source):
                self._begin_anew()
            await self._replay(source)
            await self._follow(source, socket)

    async def _is_same(self, source: Source) -> bool:
        """Whether the engine still knows what we heard last; another one does not."""
        if not self._next or not source.replay:
            return True
        async with contextlib.aclosing(self._past(source, self._next - 1)) as past:
            async for message in past:
                return message.seq == self._next - 1 and message.moment == self._moment
        return False

    def _begin_anew(self) -> None:
        log.info("kv_events_anew", endpoint=self._name)
        self._mirror.clear(is_empty=True)
        self._next = 0

    async def _follow(self, source: Source, socket: zmq.asyncio.Socket) -> None:
        loop = asyncio.get_running_loop()
        list_at = loop.time() + LIST_S
        while True:
            try:
                async with asyncio.timeout_at(list_at):
                    frames = await socket.recv_multipart()
            except TimeoutError:
                self._mirror.teller.list_anew()
                list_at = loop.time() + LIST_S
                continue
            message = self._read(frames)
            if message is not None:
                await self._take(source, message)
            await asyncio.sleep(0)  # what waits already comes without a turn for anybody else

    async def _take(self, source: Source, message: _Message) -> None:
        if message.seq < self._next and message.moment > self._moment:
            self._begin_anew()
        if message.seq > self._next:
            await self._replay(source)
        self._hear(message)

    async def _replay(self, source: Source) -> None:
        """Hear what was missed, as far as the engine still has it."""
        if source.replay:
            async for message in self._past(source, self._next):
                self._hear(message)

    async def _past(self, source: Source, first: int) -> AsyncGenerator[_Message]:
        """The engine's messages from the number `first` on, those it still has."""
        with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(source.replay)
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            with contextlib.suppress(TimeoutError):
                for _ in range(WAITING_MAX):
                    async with asyncio.timeout(REPLAY_S):
                        frames = await socket.recv_multipart()
                    message = self._read(frames)
                    if message is None:
                        return
                    yield message
                    await asyncio.sleep(0)  # thousands are there at once, and tokens wait

    def _hear(self, message: _Message) -> None:
        if message.seq < self._next:
            return  # said before
        if message.seq > self._next or message.events is None:
            log.info("kv_events_missed", endpoint=self._name, wanted=self._next, found=message.seq)
            self._mirror.clear(is_empty=False)
        self._next, self._moment = message.seq + 1, max(self._moment, message.moment)
        self._mirror.hear(message.events or ())

    def _read(self, frames: list[bytes]) -> _Message | None:
        """The number and payload, whatever stands before them; None: the end of a replay, or nothing of vLLM's."""
        if len(frames) < 2 or len(frames[-2]) != 8 or frames[-2] == END:
            return None
        seq = int.from_bytes(frames[-2], "big")
        try:
            moment, events = kv_events.decode(frames[-1])
        except WireError as error:
            log.warning("kv_events_unreadable", endpoint=self._name, reason=str(error))
            return _Message(seq, 0.0, None)
        return _Message(seq, moment, events)


def source_in(page: bytes, url: str) -> Source | None:
    """Where the engine at this URL publishes, as its /kv_event_sources says.

    Several ranks have a cache each behind one URL: which of them a request meets nobody knows, so nobody is heard.

    >>> source_in(b'{"0": {"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}}', "http://gpu7:8000").events
    'tcp://gpu7:5557'
    """
    try:
        ranks = msgspec.json.decode(page, type=dict[str, _Rank])
    except UNREADABLE:
        return None
    found = [rank for rank in ranks.values() if rank.enable_kv_cache_events]
    if len(found) != 1:
        return None
    host = urlsplit(url).hostname or "127.0.0.1"
    rank = found[0]
    replay = rank.replay_endpoint or ""
    return Source(_reachable(rank.endpoint, host), _reachable(replay, host), rank.topic)


class _Rank(msgspec.Struct):
    enable_kv_cache_events: bool = False
    endpoint: str = ""
    replay_endpoint: str | None = None
    topic: str = ""


def _reachable(endpoint: str, host: str) -> str:
    """From where we are: an engine that listens on all its addresses is at the one that we post to."""
    for anywhere in ("*", "0.0.0.0", "[::]"):  # noqa: S104  theirs, to be replaced
        endpoint = endpoint.replace(f"tcp://{anywhere}:", f"tcp://{host}:")
    return endpoint
