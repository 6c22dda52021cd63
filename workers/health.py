"""Whether an engine can be trusted with work: what it says of itself, and what it does.

ready ──probe fails, paused, asleep──> away ──probe succeeds──> ready
ready ──several failures in a row────> away ──it makes one token──> ready

What it serves is read whenever it comes, whenever it does not know a model, and now and then: behind a proxy it may be
another one between two probes, and adapters come and go without any restart.
"""

import asyncio
import contextlib
from collections.abc import Callable
from time import perf_counter

import structlog

from scheduler.errors import EngineError
from scheduler.settings import EngineAddress, WorkerSettings
from workers import features
from workers.engine import PAUSED, Card, Engine
from workers.features import Features
from workers.scrape import Load

BUSY = frozenset({404, 429})
"Refusals that say nothing against the engine: it does not have the model, or has enough to do."

ASLEEP = "asleep"
"Why an engine takes no work whose weights are put away."

CARDS_S = 10.0
"How often an engine that is ready is asked what it serves."

log = structlog.get_logger()


def is_broken(error: EngineError) -> bool:
    """Whether no HTTP status explains it: then the engine may be gone, and the next request would go the same way."""
    return error.retryable and error.status == 0


class Health:
    """One engine's state as its worker sees it, and what it can take."""

    def __init__(
        self,
        engine: Engine,
        address: EngineAddress,
        settings: WorkerSettings,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._engine, self._address, self._settings = engine, address, settings
        self.away = "not asked yet"
        "Why it takes no work; empty: it does."
        self.load = Load()
        self.load_at: float | None = None
        "When that was read."
        self.models: tuple[str, ...] = address.models
        self.max_model_len = address.max_model_len
        self.features = Features()
        "What it can do besides; looked at whenever it comes."
        self._failures = 0
        self._cards_tick = float("-inf")
        "When it was last asked what it serves."
        self._reading = asyncio.Lock()
        self._doubting = asyncio.Lock()
        self._doubts = 0
        "How many wait to hear."
        self._doubted_tick = 0.0
        self.heard_tick = float("-inf")
        "When it last sent anything of an answer."

    def succeeded(self) -> None:
        """An answer came through."""
        self._failures = 0

    def failed(self, error: EngineError) -> bool:
        """A request failed; True if that makes the engine away."""
        if not error.retryable or error.status in BUSY:
            return False
        self._failures += 1
        if self._failures < self._settings.failures_max or self.away:
            return False
        self._turn(f"{self._failures} requests failed in a row, the last: {error}")
        return True

    def distrust(self, reason: str) -> bool:
        """It has shown that it does not work; True if it counted as ready. It must make a token to come back."""
        self._failures = max(self._failures, self._settings.failures_max)
        was_ready = not self.away
        self._turn(reason)
        return was_ready

    def heard(self, tick: float) -> None:
        """It has sent something."""
        self.heard_tick = tick

    async def probe(self, *, is_doubted: bool = False) -> None:
        """Ask anew; `away` says the result. `is_doubted`: tokens that came lately do not excuse it."""
        trouble = await self._trouble()
        is_alive = perf_counter() - self.heard_tick < 2 * self._settings.probe_s
        is_excused = is_alive and not is_doubted and not self.away
        if trouble and is_excused and trouble not in (PAUSED, ASLEEP):
            return  # tokens flow: a slow or overrun web server is no dead engine
        if not trouble and self.away:
            trouble = await self._proof()
        elif not trouble and perf_counter() - self._cards_tick > CARDS_S:
            await self.has_changed()
        self._turn(trouble)

    async def has_changed(self) -> bool:
        """Whether what it serves is another than when this was asked."""
        asked_tick, before = perf_counter(), self._serves
        async with self._reading:  # one answer serves all who asked before it
            if self._cards_tick < asked_tick:
                with contextlib.suppress(EngineError):  # the next probe says what is wrong
                    await self._read_cards()
        return self._serves != before

    @property
    def _serves(self) -> tuple[tuple[str, ...], int]:
        return self.models, self.max_model_len

    @property
    def is_doubted(self) -> bool:
        """Whether somebody waits to hear if it still lives; nothing should be sent to it meanwhile."""
        return self._doubts > 0

    async def doubt(self) -> bool:
        """Ask it before anything more is sent to it; True if it has turned out to be away."""
        asked_tick = perf_counter()
        self._doubts += 1
        try:
            async with self._doubting:
                if self.away or self._doubted_tick > asked_tick:
                    return False
                await self.probe(is_doubted=True)
                self._doubted_tick = perf_counter()
                return bool(self.away)
        finally:
            self._doubts -= 1

    async def _trouble(self) -> str:
        trouble = await self._engine.probe()
        if trouble:
            return trouble
        try:
            self.load = await self._engine.load()
            self.load_at = self._clock()
        except EngineError as error:
            return f"/metrics: {error}"
        return ASLEEP if self.load.is_asleep else ""

    async def _proof(self) -> str:
        """Before it comes back: what it serves, and after failures that it really makes tokens."""
        try:
            cards = await self._read_cards()
        except EngineError as error:
            return str(error)
        if self._failures >= self._settings.failures_max:
            trouble = await self._engine.try_one(cards[0].id if cards else "")
            if trouble:
                return f"it makes no token: {trouble}"
        self._failures = 0
        await self._look(self.models[0] if self.models else "")
        return ""

    async def _read_cards(self) -> list[Card]:
        asked_tick, before = perf_counter(), self._serves
        cards = await self._engine.models()
        self._cards_tick = asked_tick
        if not self._address.models:
            self.models = tuple(card.id for card in cards)
        lengths = [card.max_model_len for card in cards if card.max_model_len]
        self.max_model_len = self._address.max_model_len or min(lengths, default=0)
        if not self.away and self._serves != before:
            log.warning(
                "engine_changed",
                endpoint=self._address.name,
                models=self.models,
                max_model_len=self.max_model_len,
            )
        return cards

    async def _look(self, model: str) -> None:
        """What it can do is good to know and no reason to stay away."""
        try:
            self.features = await features.found(self._engine, model, self._address)
        except EngineError as error:
            log.info("features_unknown", endpoint=self._address.name, reason=str(error))

    def _turn(self, away: str) -> None:
        if away != self.away:
            if away:
                log.warning("engine_away", endpoint=self._address.name, reason=away)
            else:
                log.info(
                    "engine_ready",
                    endpoint=self._address.name,
                    models=self.models,
                    version=self.features.version,
                    features=self.features.names,
                )
        self.away = away
