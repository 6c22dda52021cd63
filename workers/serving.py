"""A job in its engine: the request posted, its tokens passed on, its end. The part that a client waits for.

    1. start    the post is written in the turn that admits the job, before the word to Redis that it runs
    2. hear     tokens to the log as they come; of a prefill leg one answer, which says where its KV is
    3. end      whatever came of it: one terminal move, or the request goes back to be tried elsewhere (`ending`)

An attempt may be halted at any point, also before its task has had a turn, and still ends, once.
"""

import asyncio
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import structlog

from dispatcher.streams import sidecar
from scheduler.errors import EngineError
from scheduler.keys import Keys
from scheduler.settings import EngineAddress
from workers import body, halves
from workers.answer import Answer
from workers.attempt import FENCED, OVERRUN, Attempt, Stop
from workers.body import max_tokens
from workers.ending import Ending
from workers.engine import Engine
from workers.hands import Hands
from workers.health import Health, is_broken
from workers.kv_cache import KvCache
from workers.metrics import Meter
from workers.posts import Reply, StaleError
from workers.pulse import Pulse
from workers.rhythm import Rhythm
from workers.vigil import Vigil
from workers.writer import Writer

UNKNOWN_MODEL = 404
"An engine's status for a model that it does not have."

log = structlog.get_logger()


class Serving:
    """The attempts that are in one engine."""

    def __init__(
        self,
        address: EngineAddress,
        *,
        engine: Engine,
        keys: Keys,
        writer: Writer,
        hands: Hands,
        health: Health,
        rhythm: Rhythm,
        vigil: Vigil,
        pulse: Pulse,
        kv: KvCache,
        ending: Ending,
        meter: Meter,
        clock: Callable[[], float],
        changed: asyncio.Event,
        turned: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Serve nobody yet.

        Args:
            address: of the engine.
            engine: what is asked.
            keys: of the pool.
            writer: of tokens and moves.
            hands: who is where.
            health: told of every answer and failure.
            rhythm: told of every token.
            vigil: told what must follow.
            pulse: told what the next beat must say.
            kv: told what was computed.
            ending: what becomes of those who are through.
            meter: counts who was fenced.
            clock: what time it is on Redis.
            changed: set where one of the held may now be admitted.
            turned: called where the engine has gone or come back.
        """
        self._address, self._engine, self._keys, self._writer = address, engine, keys, writer
        self._hands, self._health, self._rhythm, self._vigil = hands, health, rhythm, vigil
        self._pulse, self._kv, self._ending, self._meter = pulse, kv, ending, meter
        self._clock, self._changed, self._turned = clock, changed, turned
        self.group: asyncio.TaskGroup | None = None
        "Of the present epoch, whose end is the end of every task here."

    def start(self, attempt: Attempt) -> None:
        """Admit it: the engine is asked in this very turn, where a connection is kept."""
        attempt.admitted_at = self._clock()
        attempt.admitted_tick = attempt.last_tick = perf_counter()
        # Before all else, and before the word to Redis: the engine is what the client waits for.
        begun = self._begun(attempt)
        self._hands.start(attempt)
        self._vigil.began(attempt.last_tick)
        assert self.group is not None
        attempt.task = self.group.create_task(self._serve(attempt, begun), name=attempt.name)
        attempt.task.add_done_callback(lambda task: self._left(attempt, task, begun))
        self._writer.send(
            attempt,
            sidecar.start(self._keys, attempt.held),
            lambda reply: self._started(attempt, reply),
        )
        self._pulse.started(attempt.name)

    def _begun(self, attempt: Attempt) -> Reply | None:
        """The post, on its way already where a connection is kept; else its task sees to it."""
        if attempt.job.leg == "prefill":
            return None
        try:
            post = self._post(attempt)
            return None if post.is_spent else self._engine.begin(post, *self._ears(attempt))
        except Exception:  # noqa: BLE001
            return None  # its task trips over the same, behind the door for that

    def _left(self, attempt: Attempt, task: asyncio.Task[None], begun: Reply | None) -> None:
        """Its task is over: one that was halted before its first turn has done nothing, not even for its end."""
        if begun is not None:
            begun.cancel()
        if task.cancelled() and attempt.stop is not None and attempt.stage == "running":
            self._served(attempt, None)

    def _started(self, attempt: Attempt, reply: int) -> None:
        if reply == 0:
            self._meter.fenced.inc()
            attempt.halt(FENCED)
            # Whoever took the request took its job away as well, unless Redis lost one of the two.
            held = attempt.held
            call = sidecar.dismiss(self._keys, held.endpoint, held.job.epoch, [held.job_entry])
            self._writer.send(None, call, lambda _: None)
        elif reply == 2:
            attempt.halt(Stop("cancelled", "cancelled before it started"))

    async def _serve(self, attempt: Attempt, begun: Reply | None) -> None:
        """Let the engine answer; whatever comes of it, the attempt is brought to an end here."""
        error: EngineError | None = None
        try:
            error = await self._answered(attempt, begun)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if attempt.stop is None or task.uncancel() > 0:
                raise
        except Exception as bug:
            # The one door: a request that trips a bug must not take the others along.
            log.exception("serving_failed", request_id=attempt.job.id, endpoint=self._address.name)
            error = EngineError(f"the worker failed: {type(bug).__name__}: {bug}")
        self._served(attempt, error)

    async def _answered(self, attempt: Attempt, begun: Reply | None) -> EngineError | None:
        """The engine's answer, all of it taken in; what was wrong with it, or nothing."""
        try:
            if begun is not None:
                await self._told(attempt, begun)
                attempt.answer.check(attempt.written)
            elif attempt.job.leg == "prefill":
                await self._prefill(attempt, self._post(attempt))
            elif not (post := self._post(attempt)).is_spent:
                await self._engine.ask(post, *self._ears(attempt))
                attempt.answer.check(attempt.written)
        except EngineError as error:
            # Where KV could not be fetched this engine is not to blame, or not alone: it is asked, not counted.
            is_alone = attempt.job.leg != "decode" or attempt.first_token_at is not None
            has_turned = is_alone and self._health.failed(error)
            if is_broken(error) or not is_alone:
                has_turned = await self._health.doubt() or has_turned
                self._changed.set()
            elif error.status == UNKNOWN_MODEL:
                has_turned = await self._health.has_changed()
            if has_turned:
                await self._turned()
            return error
        return None

    async def _told(self, attempt: Attempt, begun: Reply) -> None:
        """The answer to what was begun; where the engine had just closed that connection, to the same over a new one."""
        try:
            await self._engine.reply(begun)
        except StaleError:
            await self._engine.ask(self._post(attempt), *self._ears(attempt))

    def _post(self, attempt: Attempt) -> body.Post:
        return body.post(
            attempt.job, attempt.body, attempt.written, by_priority=self._address.by_priority
        )

    def _ears(self, attempt: Attempt) -> tuple[Answer, Callable[[bool], None]]:
        return attempt.answer, lambda more: self._heard(attempt, more=more)

    async def _prefill(self, attempt: Attempt, post: body.Post) -> None:
        """Have the prompt computed, for another engine to decode."""
        if post.is_spent:
            attempt.kv_params = halves.NO_KV
            return
        attempt.kv_params = await self._engine.prefill(post, attempt.answer)
        tick = perf_counter()
        self._health.heard(tick)
        attempt.first_token_at = self._clock()
        attempt.first_tick = attempt.last_tick = tick
        self._rhythm.first(attempt, tick)

    def _heard(self, attempt: Attempt, *, more: bool) -> None:
        """The engine has sent something for this attempt; the hot path, once a token."""
        tick = perf_counter()
        self._health.heard(tick)
        if not more or attempt.stage != "running":
            return
        if attempt.answer.is_overrun:
            attempt.halt(OVERRUN)
        gap_s = tick - attempt.last_tick
        attempt.last_tick = tick
        if attempt.first_token_at is None:
            attempt.first_token_at = self._clock()
            attempt.first_tick = tick
            if attempt.job.stream:  # first of all: somebody waits for it
                self._writer.note(attempt, is_urgent=True)
            self._pulse.first_token(attempt.name, attempt.first_token_at - attempt.pulled_at)
            self._rhythm.first(attempt, tick)
            self._vigil.spoke(tick)
            if self._hands.held:
                self._changed.set()
            return
        attempt.gap_max_s = max(attempt.gap_max_s, gap_s)
        self._rhythm.gap(attempt, gap_s, tick, self._hands.running.values())
        if attempt.job.stream:
            self._writer.note(attempt, is_urgent=False)

    def _served(self, attempt: Attempt, error: EngineError | None) -> None:
        stop = attempt.stop
        if stop is not None and stop.kind == "silent":
            error, stop = _silence(attempt, stop.reason), None
            if error is not None and self._health.failed(error):
                assert self.group is not None
                self.group.create_task(self._turned(), name=f"{self._address.name} turned")
        elif stop is not None and stop.kind == "overrun":
            self._cut(attempt)
            stop = None
        if stop is not None:
            self._ending.stopped(attempt, stop)
        elif error is None and attempt.job.leg == "prefill":
            self._health.succeeded()
            self._kv.computed(attempt.job, attempt.body)
            self._ending.prefilled(attempt)
        elif error is None:
            self._ending.finish(attempt, "completed")
            self._health.succeeded()
            self._rhythm.answers.add(attempt.output_tokens)
            self._kv.computed(attempt.job, attempt.body)
        else:
            self._ending.failed(attempt, error)
        # Last: the client waits for the end, and for nothing of this.
        self._hands.leave(attempt)
        self._rhythm.left(attempt, is_empty=not self._hands.running)
        if self._hands.held:
            self._changed.set()

    def _cut(self, attempt: Attempt) -> None:
        """What its engine would not end has ended: the client asked for no more, and has it."""
        attempt.answer.cut(attempt.prompt_tokens)
        self._meter.overruns.labels(self._address.name).inc()
        log.warning(
            "overrun",
            request_id=attempt.job.id,
            endpoint=self._address.name,
            max_tokens=max_tokens(attempt.body),
            output_tokens=attempt.output_tokens,
            reason=OVERRUN.reason,
        )


def _silence(attempt: Attempt, reason: str) -> EngineError | None:
    """What is wrong with an answer that was waited for no longer: nothing, where all of it had been said."""
    if not attempt.answer.is_done:
        return EngineError(reason)
    try:
        attempt.answer.check(attempt.written)
    except EngineError as error:
        return error
    return None
