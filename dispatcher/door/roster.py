"""Which models are served, as the endpoints' own beats say, and whether anybody leads."""

import asyncio
import contextlib
import math
import time

import msgspec

from dispatcher.streams.connection import Connection
from scheduler import codec
from scheduler.errors import StreamError, WireError
from scheduler.keys import Keys
from scheduler.wire.worker import Beat

LOOK_S = 1.0
"How often the beats are looked at: as often as an endpoint that is idle beats."

AGAIN_S = 0.05
"A model that nobody is known to serve is looked for again before it is refused, at most so often: who asks may wait so long."

BEATS_READ = 2000
"The newest beats read in one look; a busy fleet beats more often, and each of its endpoints is among them."

KNOWN_MAX = 10_000
"Models and endpoints remembered; beyond that the oldest are forgotten."


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model that is served now."""

    id: str
    max_model_len: int
    "The longest context of any endpoint that serves it; 0: unknown."

    since: int
    "Unix seconds of its first beat that was seen."


class Roster:
    """The endpoints that live and what they serve. `run` is its task; it is a second old, at most."""

    def __init__(self, connection: Connection, keys: Keys, *, lease_s: float) -> None:
        """An endpoint that has been silent for `lease_s` is dead."""
        self._connection, self._keys, self._lease_s = connection, keys, lease_s
        self._after = "0"
        self._beats: dict[str, tuple[float, Beat]] = {}
        self._since: dict[str, int] = {}
        self._looked_at = -AGAIN_S
        self._looking = asyncio.Lock()
        self.trouble = "not looked yet"
        "Why the last look failed; empty where it did not."
        self._led_until = 0.0

    async def run(self) -> None:
        """Look for ever."""
        while True:
            async with self._looking:
                await self._look()
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        """Read what has been beaten since the last look; `trouble` says how that went."""
        self._looked_at = time.monotonic()
        try:
            await self._connection.refresh_clock()
            beats = await self._connection.newest(
                self._keys.beats, after=self._after, count=BEATS_READ
            )
        except StreamError as error:
            self.trouble = str(error)
            return
        self.trouble = ""
        await self._look_for_leader()
        latest = {fields.get(b"endpoint", b""): (entry, fields) for entry, fields in beats}
        for entry, fields in latest.values():
            with contextlib.suppress(WireError):  # a stray entry is the dispatcher's business
                self._heard(entry, codec.decode(Beat, fields))
        if beats:
            self._after = beats[-1][0]

    async def _look_for_leader(self) -> None:
        try:
            until = await self._connection.command("HGET", self._keys.leader, "until")
        except StreamError:  # users of an older version may not ask; that is no outage
            self._led_until = math.inf
            return
        self._led_until = int(until or 0) / 1e3

    @property
    def idle(self) -> str:
        """Why a request would only wait now; empty where somebody would take it up."""
        if self._led_until <= self._connection.now():
            return "nobody leads the pool"
        return "" if self.has_any() else "no endpoint takes work"

    async def is_served(self, model: str) -> bool:
        """Whether an endpoint that lives serves it; "no" is what a look found that began after the question."""
        if self._serves(model):
            return True
        asked_at = time.monotonic()
        async with self._looking:  # one look answers all who ask meanwhile
            if self._looked_at < asked_at:
                await asyncio.sleep(self._looked_at + AGAIN_S - asked_at)
                await self._look()
        return self._serves(model)

    def is_known(self, model: str) -> bool:
        """Whether it was ever served, as far as anybody remembers."""
        return model in self._since

    def has_any(self) -> bool:
        """Whether any endpoint takes work."""
        return any(self._is_alive(seen_at, beat) for seen_at, beat in self._beats.values())

    def models(self) -> list[Model]:
        """What is served now, by name."""
        lengths: dict[str, int] = {}
        for seen_at, beat in self._beats.values():
            if self._is_alive(seen_at, beat):
                for model in beat.models:
                    lengths[model] = max(lengths.get(model, 0), beat.max_model_len)
        return [
            Model(id=name, max_model_len=length, since=self._since.get(name, 0))
            for name, length in sorted(lengths.items())
        ]

    def _serves(self, model: str) -> bool:
        return any(
            model in beat.models and self._is_alive(seen_at, beat)
            for seen_at, beat in self._beats.values()
        )

    def _is_alive(self, seen_at: float, beat: Beat) -> bool:
        return beat.state == "ready" and self._connection.now() - seen_at < self._lease_s

    def _heard(self, entry: str, beat: Beat) -> None:
        seen_at = int(entry.partition("-")[0]) / 1e3
        self._beats.pop(beat.endpoint, None)  # so that the order is that of hearing
        self._beats[beat.endpoint] = (seen_at, beat)
        for model in beat.models:
            self._since.setdefault(model, int(seen_at))
        if len(self._beats) > KNOWN_MAX:
            del self._beats[next(iter(self._beats))]
        if len(self._since) > KNOWN_MAX:
            del self._since[next(iter(self._since))]
