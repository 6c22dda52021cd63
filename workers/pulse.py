"""An endpoint's heartbeat, and the news that ride on it."""

import asyncio
import contextlib
from collections.abc import Callable
from time import perf_counter

import structlog

from dispatcher.streams import sidecar
from dispatcher.streams.connection import Connection
from scheduler.errors import FencedError, StreamError
from scheduler.keys import Keys
from scheduler.settings import LeaseSettings
from scheduler.wire.worker import Beat

log = structlog.get_logger()

NEWS_MAX = 512
"Reports in one beat; the rest ride on the next."


class Pulse:
    """Beats every `beat_s`, and `news_s` after there is something to say."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        lease: LeaseSettings,
        *,
        news_s: float,
        beat: Callable[[tuple[str, ...], tuple[str, ...]], Beat],
        arrived: Callable[[Beat], None],
    ) -> None:
        """`beat` makes one from the news there is; `arrived` is told of each that got through."""
        self._connection, self._keys, self._lease = connection, keys, lease
        self._news_s, self._beat, self._arrived = news_s, beat, arrived
        self._started: list[str] = []
        self._first_tokens: list[str] = []
        self._news = asyncio.Event()
        self._heard_tick = perf_counter()
        self._beating = asyncio.Lock()

    def started(self, name: str) -> None:
        """This attempt is in the engine."""
        self._started.append(name)
        self._news.set()

    def first_token(self, name: str, after_s: float) -> None:
        """This attempt has its first token, so long after its pull."""
        self._first_tokens.append(f"{name}:{after_s * 1e3:.1f}")
        self._news.set()

    def hurry(self) -> None:
        """Something else is worth saying now."""
        self._news.set()

    @property
    def has_lapsed(self) -> bool:
        """By our own clock the lease is surely over: others may hold what we held."""
        return perf_counter() - self._heard_tick > self._lease.worker_s

    async def run(self) -> None:
        """Beat for ever.

        Raises:
            FencedError: a newer worker has joined in this endpoint's name.
        """
        lost = 0
        while True:
            try:
                await self.beat_now()
            except StreamError as error:
                if isinstance(error, FencedError):
                    raise
                if lost & (lost - 1) == 0:  # ever more rarely: an hour's outage is a dozen lines
                    log.warning("beat_lost", reason=str(error), lost=lost)
                lost += 1
                await asyncio.sleep(min(self._lease.beat_s, 0.25))
                continue
            lost = 0
            await self._until_due()

    async def beat_now(self) -> None:
        """One beat, with the news so far; they are kept where it does not get through."""
        async with self._beating:
            await self._say()

    async def _say(self) -> None:
        self._news.clear()
        started = tuple(self._started[:NEWS_MAX])
        first_tokens = tuple(self._first_tokens[:NEWS_MAX])
        asked_tick = perf_counter()
        beat = self._beat(started, first_tokens)
        call = sidecar.beat(self._keys, beat, lease_s=self._lease.worker_s)
        reply = await self._connection.call(call.function, call.keys, call.args)
        if reply == 0:
            raise FencedError("a newer worker has joined in this endpoint's name")
        self._heard_tick = asked_tick  # the lease may have begun as early as this
        self._arrived(beat)
        del self._started[: len(started)]
        del self._first_tokens[: len(first_tokens)]
        if self._started or self._first_tokens:
            self._news.set()

    async def _until_due(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._lease.beat_s):
                await self._news.wait()
                await asyncio.sleep(self._news_s)
