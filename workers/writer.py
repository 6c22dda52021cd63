"""Everything a worker writes to Redis about its jobs, in order, many moves in one round trip.

Token logs gather for a few milliseconds; the first token of a request, its start and its end go at once, and take
along whatever is ready: a first token and an end leave in the same turn of the loop in which they come. One batch
is under way at a time: under load the batches grow by themselves. While Redis is away the same batch is sent again
and again; every move recognises its own repetition.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import structlog

from dispatcher.streams import sidecar
from dispatcher.streams.connection import Begun, Call, Connection
from scheduler.errors import StreamError
from scheduler.keys import Keys
from scheduler.settings import WorkerSettings
from workers.attempt import FENCED, Attempt
from workers.metrics import Meter

BATCH_MAX = 512
"Moves in one round trip; at some 10 us each the server is busy for 5 ms with them."

RETRY_MIN_S, RETRY_MAX_S = 0.05, 1.0
"How long to wait before the same batch again while Redis is away."

log = structlog.get_logger()

Replied = Callable[[int], None]
_Move: TypeAlias = tuple[Attempt | None, Call, Replied]


class Writer:
    """The one writer of a process; `run` is its task."""

    def __init__(
        self, connection: Connection, keys: Keys, settings: WorkerSettings, meter: Meter
    ) -> None:
        self._connection, self._keys, self._settings, self._meter = (
            connection,
            keys,
            settings,
            meter,
        )
        self._pending: list[_Move] = []
        self._begun: tuple[list[_Move], Begun] | None = None
        "Sent already, before `run` had its turn."
        self._is_flushing = False
        self._dirty: dict[Attempt, None] = {}
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_away = False
        "Redis did not answer last time."

    def note(self, attempt: Attempt, *, is_urgent: bool) -> None:
        """The attempt has new pieces for its token log."""
        if is_urgent:
            self._log(attempt)
            self._begin()
            return
        self._dirty[attempt] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._settings.tokens_s, self._due)

    def send(self, attempt: Attempt | None, call: Call, replied: Replied) -> None:
        """Send this move as soon as possible, after all earlier ones."""
        self._pending.append((attempt, call, replied))
        self._idle.clear()
        self._wake.set()

    def end(self, attempt: Attempt, call: Callable[[int], Call], replied: Replied) -> None:
        """Send the rest of the token log and then this last move, which is told how many pieces there are."""
        self._dirty.pop(attempt, None)
        if attempt.job.stream:
            self._log(attempt)
        self.send(attempt, call(attempt.pieces), replied)
        self._begin()

    def follow(self, attempt: Attempt, call: Call, replied: Replied) -> None:
        """Send what follows its last move: right behind it, in a write of its own, where that is just under way."""
        if self._begun and not self._pending:
            batch, begun = self._begun
            if self._connection.extend(begun, [call]):
                batch.append((attempt, call, replied))
                return
        self.send(attempt, call, replied)

    def drop(self, attempt: Attempt) -> None:
        """Write nothing more of it."""
        self._dirty.pop(attempt, None)
        self._pending = [item for item in self._pending if item[0] is not attempt]

    async def settled(self) -> None:
        """Wait until everything sent has been answered."""
        await self._idle.wait()

    async def run(self) -> None:
        """Write for ever."""
        retry_s = RETRY_MIN_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._is_due:
                self._gather()
            while self._pending or self._begun:
                if await self._flush():
                    retry_s = RETRY_MIN_S
                    continue
                self._bound()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)
            self._idle.set()

    def _due(self) -> None:
        self._timer = None
        self._is_due = True
        self._wake.set()

    def _gather(self) -> None:
        self._is_due = False
        for attempt in self._dirty:
            self._log(attempt)
        self._dirty.clear()

    def _log(self, attempt: Attempt) -> None:
        entry = attempt.piece()
        if entry is None:
            return
        call = sidecar.tokens(self._keys, attempt.held, entry, ttl_s=self._settings.keep_s)
        self.send(attempt, call, lambda reply: self._logged(attempt, reply))

    def _logged(self, attempt: Attempt, reply: int) -> None:
        # While ending, the last move's own reply tells: after it even our own repeated piece is refused.
        if reply == 0 and attempt.stage == "running":
            self._meter.fenced.inc()
            attempt.halt(FENCED)

    def _begin(self) -> None:
        """Send what is ready, unless a batch is under way."""
        if self._is_flushing or self._begun or self.is_away:
            return
        batch = self._pending[:BATCH_MAX]
        begun = self._connection.begin(_calls(batch))
        if begun is not None:
            self._pending = self._pending[BATCH_MAX:]
            self._begun = batch, begun

    async def _flush(self) -> bool:
        """One round trip; False where Redis did not take all of it."""
        if self._begun:
            (batch, begun), self._begun = self._begun, None
        else:
            batch, self._pending = self._pending[:BATCH_MAX], self._pending[BATCH_MAX:]
            begun = None
        self._is_flushing = True
        try:
            replies: list[Any] = await self._connection.batch(_calls(batch), begun)
        except StreamError as error:
            self._note_weather(str(error))
            self._pending = batch + self._pending
            return False
        finally:
            self._is_flushing = False
        refused = [reply for reply in replies if isinstance(reply, StreamError)]
        if not refused:
            self._note_weather("")
            for (_, _, replied), reply in zip(batch, replies, strict=True):
                replied(int(reply))
            return True
        self._note_weather(str(refused[0]))
        self._again(batch, replies)
        return False

    def _again(self, batch: list[_Move], replies: list[Any]) -> None:
        """Keep what was refused with an error, and all that follows it of the same attempt."""
        kept = []
        held_up: set[Attempt | None] = set()
        for item, reply in zip(batch, replies, strict=True):
            if isinstance(reply, StreamError) or item[0] in held_up:
                kept.append(item)
                held_up.add(item[0])
            else:
                item[2](int(reply))
        self._pending = kept + self._pending

    def _note_weather(self, trouble: str) -> None:
        if trouble and not self.is_away:
            log.warning("redis_away", reason=trouble)
        if self.is_away and not trouble:
            log.info("redis_back")
        self.is_away = bool(trouble)

    def _bound(self) -> None:
        """While Redis is away text gathers here; give up the longest answers where it is too much."""
        by_size = sorted(self._dirty, key=lambda a: a.answer.fresh_bytes, reverse=True)
        total = sum(a.answer.fresh_bytes for a in by_size)
        for attempt in by_size:
            if total <= self._settings.buffer_bytes:
                break
            total -= attempt.answer.fresh_bytes
            attempt.tear("Redis was away and the worker's buffer is full")


def _calls(batch: list[_Move]) -> list[Call]:
    """What is said: a log is taken in its order or not at all, also by a server that refuses one move and takes the next."""
    calls: list[Call] = []
    before: set[Attempt | None] = set()
    for attempt, call, _ in batch:
        calls.append(sidecar.behind(call) if attempt in before else call)
        before.add(attempt)
    return calls
