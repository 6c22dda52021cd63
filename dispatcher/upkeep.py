"""What a leader does beside its turns: keep the learned state, cut the logs, set the clock, weigh Redis.

Nothing here is urgent: what fails is said aloud and tried again the next time.
"""

import asyncio

import structlog

from dispatcher import recovery
from dispatcher.intake import order
from dispatcher.metrics import Memory, Meter
from dispatcher.recovery import CONTROLS_KEPT, Saved
from dispatcher.streams import cut, dispatch
from dispatcher.streams.connection import Connection
from dispatcher.streams.dispatch import DEAD_KEPT
from scheduler.errors import FencedError, StreamError
from scheduler.keys import DISPATCHER_GROUP, Keys

TRIM_EVERY_S = 10.0
"Between two cuts; a cut without work costs microseconds."

KEEP_PART = 4
"How often in the life of a claim check those of the waiting are given a new one: three may fail."

KEEP_BATCH = 1000
"Claim checks in one round trip, some 0.5 ms of the server's time."

IDLE_S = 3600.0
"A consumer that holds nothing and was silent for so long belongs to a node that is gone."

EVICTS = "at its maxmemory it throws away requests, bodies and answers instead of refusing new ones"

log = structlog.get_logger()


class Upkeep:
    """Keeps one pool's house under one epoch."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        epoch: int,
        *,
        node: str,
        retention_s: float,
        body_ttl_s: float,
        meter: Meter | None = None,
    ) -> None:
        """Logs are kept for `retention_s`, claim checks for `body_ttl_s`; what Redis weighs is told to the meter."""
        self._connection = connection
        self._keys = keys
        self._epoch = epoch
        self._node = node
        self._retention_s = retention_s
        self._body_ttl_s = body_ttl_s
        self._kept_at = float("-inf")
        self._has_warned = False
        self._meter = meter or Meter()

    async def run(self) -> None:
        """Trim, set the clock and weigh until cancelled."""
        while True:
            try:
                await self._connection.refresh_clock()
                await self.trim()
                await self._retire()
                if self._connection.now() - self._kept_at >= self._body_ttl_s / KEEP_PART:
                    self._kept_at = self._connection.now()
                    await self.keep_bodies()
                await self.weigh()
            except StreamError as error:
                log.warning("upkeep_failed", reason=str(error))
            await asyncio.sleep(TRIM_EVERY_S)

    async def save(self, saved: Saved) -> None:
        """Keep a snapshot.

        Raises:
            FencedError: a newer leader exists; its snapshot stays.
        """
        call = recovery.saving(self._keys, self._epoch, saved)
        reply = await self._connection.call(call.function, call.keys, call.args)
        if reply == dispatch.FENCED:
            raise FencedError("a newer leader exists")

    async def trim(self) -> None:
        """Cut what is older than the retention; of `requests` nothing that is unread or unfinished."""
        await self.trim_logs()
        edge = await self._done_before(self._retained_from())
        await self._connection.commands([cut.older(self._keys.requests, edge)])

    async def trim_logs(self) -> None:
        """Cut the logs alone, which need not be there: a Redis that is full refuses what a takeover writes."""
        keys, before = self._keys, self._retained_from()
        logs = (keys.rewards, keys.beats, keys.results, keys.decisions)
        words = [cut.older(log_, before) for log_ in logs]
        words += [
            ("XTRIM", keys.controls, "MAXLEN", "~", str(CONTROLS_KEPT)),
            ("XTRIM", keys.dead, "MAXLEN", "~", str(DEAD_KEPT)),
        ]
        await self._connection.commands(words)

    def _retained_from(self) -> str:
        return f"{round((self._connection.now() - self._retention_s) * 1e3)}-0"

    async def keep_bodies(self) -> None:
        """Let the claim checks of all who wait live on: a queue may be longer than their life, a fleet away for days."""
        first, ttl_ms = 0, str(round(self._body_ttl_s * 1e3))
        while True:
            last = first + KEEP_BATCH - 1
            ids = await self._connection.command("ZRANGE", self._keys.waiting, first, last)
            if not ids:
                return
            bodies = [self._keys.body(str(one, "utf-8")) for one in ids]
            await self._connection.commands([("PEXPIRE", body, ttl_ms, "GT") for body in bodies])
            first += KEEP_BATCH

    async def weigh(self) -> None:
        """Note how much memory Redis uses, and whether it would evict: either ends in lost or refused work."""
        info = await self._connection.memory()
        policy, max_bytes = str(info["maxmemory_policy"]), int(info["maxmemory"])
        evicts = policy != "noeviction"
        if evicts and max_bytes and not self._has_warned:
            log.warning("redis_evicts", maxmemory_policy=policy, wanted="noeviction", reason=EVICTS)
        self._has_warned = evicts and max_bytes > 0
        self._meter.memory = Memory(
            used_bytes=int(info["used_memory"]), max_bytes=max_bytes, evicts=evicts
        )

    async def _done_before(self, before: str) -> str:
        """The earliest of: the retention's edge, the oldest unfinished entry, the first unread one."""
        requests = self._keys.requests
        delivered = await self._connection.delivered(requests, DISPATCHER_GROUP)
        oldest = await self._connection.oldest_pending(requests, DISPATCHER_GROUP)
        edges = [before, delivered, *([oldest] if oldest else [])]
        return min(edges, key=order)

    async def _retire(self) -> None:
        """Forget consumers of nodes that are gone for good."""
        known = await self._connection.consumers(self._keys.requests, DISPATCHER_GROUP)
        gone = [
            name
            for name, (pending, silent_s) in known.items()
            if name != self._node and not pending and silent_s > IDLE_S
        ]
        await self._connection.batch(
            [dispatch.retire(self._keys, name, idle_s=IDLE_S) for name in gone]
        )
