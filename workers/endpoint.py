"""One engine's worker: takes its jobs, admits them to the engine, and brings each to its one end.

    1. join     a new epoch; whoever worked in this name before is fenced
    2. read     jobs arrive with their bodies and what earlier attempts wrote (`inbox`)
    3. admit    as many as the promises of the batch allow (`scheduler.batch`)
    4. serve    `start` and POST in the same moment; tokens to the log as they come (`engine`, `writer`)
    5. end      one terminal move, or the request goes back to be tried elsewhere

Silence at every point has a bound, and nothing ends without a reply from Redis or a newer lease.
"""

import asyncio
import contextlib
from time import perf_counter

import structlog

from dispatcher.streams import sidecar
from dispatcher.streams.connection import Connection
from scheduler import batch
from scheduler.batch import Limits
from scheduler.errors import EngineError, FencedError, StreamError, WireError
from scheduler.keys import Keys
from scheduler.settings import EngineAddress, LeaseSettings, WorkerSettings
from scheduler.wire import Beat, EndpointState
from workers import body
from workers.attempt import FENCED, Attempt, Stop
from workers.ending import Ending
from workers.engine import Engine
from workers.health import Health, is_broken
from workers.holdings import Holdings, following
from workers.inbox import Arrival, Inbox
from workers.kv_cache import KvCache
from workers.metrics import Gaps, Meter
from workers.pulse import Pulse
from workers.rhythm import Rhythm
from workers.vigil import Vigil
from workers.writer import Writer

TEND_S = 0.1
"How often the held are tried again: what they promised weighs more the longer they wait."

RETRY_S = 0.25
"How long to wait before reading again while Redis is away."

log = structlog.get_logger()


class Endpoint:
    """One engine under one name in one pool. `run` is its task and `drain` its end."""

    def __init__(
        self,
        address: EngineAddress,
        *,
        connection: Connection,
        writer: Writer,
        keys: Keys,
        settings: WorkerSettings,
        lease: LeaseSettings,
        meter: Meter,
        worker: str,
    ) -> None:
        self.name = address.name
        self._address, self._connection, self._writer = address, connection, writer
        self._keys, self._settings, self._lease = keys, settings, lease
        self._meter, self._worker = meter, worker
        self._engine = Engine(address, connect_s=settings.connect_s)
        self._inbox = Inbox(connection, keys, self.name, worker)
        self._pulse = Pulse(
            connection,
            keys,
            lease,
            news_s=settings.news_s,
            beat=self._beat,
            arrived=self._beaten,
        )
        self._kv = KvCache(self._engine, self.name)
        self._said = Holdings()
        self._said_tick = float("-inf")
        self.health = Health(self._engine, address, settings, clock=connection.now)
        self.rhythm = Rhythm(address.hardware, meter.gaps.setdefault(self.name, Gaps()))
        self._ending = Ending(
            address,
            writer=writer,
            keys=keys,
            settings=settings,
            meter=meter,
            clock=connection.now,
            gone=self._forget,
        )
        self._epoch = 0
        self._attempts: dict[str, Attempt] = {}
        "Everything not gone, by request id."
        self._held: dict[str, Attempt] = {}
        self._running: dict[str, Attempt] = {}
        self._vigil = Vigil(settings, connection.now)
        self._doubting = asyncio.Lock()
        self._doubts = 0
        "Attempts that wait to hear whether the engine still lives; nothing is admitted meanwhile."
        self._doubted_tick = 0.0
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = ""
        self._group: asyncio.TaskGroup | None = None

    @property
    def state(self) -> EndpointState:
        """As its beats say it."""
        if self._draining:
            return "draining"
        return "away" if self.health.away else "ready"

    async def run(self) -> None:
        """Work until cancelled, or until a newer worker joins in this name."""
        await self._engine.open()
        try:
            while True:
                await self._join()
                await self._live()
                self._drop_all()
                if not await self._is_forgotten():
                    log.warning("stood_down", endpoint=self.name, epoch=self._epoch)
                    return
                log.warning("redis_forgot_us", endpoint=self.name, epoch=self._epoch)
        finally:
            await self._engine.close()

    async def _live(self) -> None:
        """One epoch: until cancelled, or until the beat is fenced."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                tasks = (self._read, self._tend, self._pulse.run, self._watch, self._adopt)
                for task in (*tasks, self._kv.run):
                    group.create_task(task(), name=f"{self.name} {task.__qualname__}")
        except* FencedError as fenced:
            log.debug("fenced", endpoint=self.name, reason=str(fenced.exceptions[0]))

    async def drain(self, drain_s: float, hurry: asyncio.Event) -> None:
        """Take nothing new, give the held back, let the running finish for so long, give back the rest."""
        self._draining = "the worker was told to end"
        self._pulse.hurry()
        self._return_held(self._draining)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await _either(self._empty, hurry)
        for attempt in list(self._running.values()):
            attempt.halt(Stop("returned", self._draining))
        await self._empty.wait()

    def show(self) -> None:
        """Bring the gauges up to date."""
        self._meter.held.labels(self.name).set(len(self._held))
        self._meter.running.labels(self.name).set(len(self._running))
        self._meter.is_ready.labels(self.name).set(self.state == "ready")
        self._meter.step_law(self.name, self.rhythm.step_time)

    # The tasks.

    async def _join(self) -> None:
        while True:
            try:
                await self._inbox.open()
                call = sidecar.join(self._keys, self.name, self._worker)
                self._epoch = int(await self._connection.call(call.function, call.keys, call.args))
            except StreamError as error:
                log.warning("redis_away", endpoint=self.name, reason=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                log.info("joined", endpoint=self.name, epoch=self._epoch, url=self._address.url)
                return

    async def _read(self) -> None:
        while True:
            await self._has_room.wait()
            try:
                await self._inbox.read(self._settings.held_max - len(self._attempts))
                await self._take()
            except StreamError as error:
                log.debug("read_lost", endpoint=self.name, reason=str(error))
                await asyncio.sleep(RETRY_S)
                with contextlib.suppress(StreamError):
                    await self._inbox.open()

    async def _adopt(self) -> None:
        while True:
            await asyncio.sleep(self._lease.beat_s)
            if self._pulse.has_lapsed:
                continue
            with contextlib.suppress(StreamError):
                await self._connection.refresh_clock()
                await self._inbox.adopt()
                await self._take()

    async def _tend(self) -> None:
        """Admit when anything changes; look after deadlines and silences when one may be over."""
        while True:
            wait_s = min(self._vigil.due_s(), TEND_S if self._held else float("inf"))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wait_s == float("inf") else max(0.0, wait_s)):
                    await self._changed.wait()
            self._changed.clear()
            if self._vigil.due_s() <= 0:
                await self._end_the_late()
            self._admit()

    async def _watch(self) -> None:
        while True:
            before = self.health.away
            await self.health.probe()
            if self.health.away != before:
                await self._turned()
            await asyncio.sleep(self._settings.probe_s)

    # Arriving.

    async def _take(self) -> None:
        arrivals = await self._inbox.take(self._epoch, self._cancel, self._knows)
        for arrival in arrivals:
            self._arrive(arrival)
        if arrivals:
            self._changed.set()

    def _knows(self, request_id: str, attempt: int) -> bool:
        known = self._attempts.get(request_id)
        return known is not None and known.job.attempt == attempt

    def _arrive(self, arrival: Arrival) -> None:
        job = arrival.held.job
        older = self._attempts.get(job.id)
        if older is not None:  # it was taken from us and has come back
            older.halt(FENCED)
            self._forget(older)
        trouble = ""
        try:
            parsed = body.read(arrival.raw_body, job.path) if arrival.raw_body else {}
        except WireError as error:
            parsed, trouble = {}, str(error)
        attempt = Attempt(
            arrival.held, parsed, pulled_at=self._connection.now(), written=arrival.written
        )
        attempt.expect(self.rhythm.usual_tokens)
        self._attempts[job.id] = attempt
        self._vigil.arrived(attempt)
        self._empty.clear()
        if len(self._attempts) >= self._settings.held_max:
            self._has_room.clear()
        if job.attempt > 1:
            self._meter.retries.labels(self.name).inc()
        if arrival.trouble:
            self._ending.give_back(attempt, arrival.trouble)
            return
        if not arrival.raw_body:
            trouble = "its body is gone: the claim check has run out"
        if trouble:
            self._ending.finish(attempt, "invalid", trouble, is_dead=True)
        elif self._draining or self.health.away:
            self._ending.give_back(attempt, self._draining or f"engine away: {self.health.away}")
        else:
            self._held[job.id] = attempt

    def _cancel(self, request_id: str, reason: str) -> None:
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            self._stop(attempt, Stop("cancelled", reason))

    # Admitting.

    def _admit(self) -> None:
        if not self._held or not self._may_admit:
            return
        tick = perf_counter()
        held = list(self._held.values())
        chosen = batch.admit(
            [attempt.member(tick) for attempt in self._running.values()],
            [attempt.candidate() for attempt in held],
            self.rhythm.step_time.law,
            self._limits(),
            self._connection.now(),
        )
        for index in chosen:
            self._start(held[index])

    @property
    def _may_admit(self) -> bool:
        is_engine_there = not self.health.away and not self._doubts
        return is_engine_there and not self._draining and not self._pulse.has_lapsed

    def _limits(self) -> Limits:
        settings = self._settings
        return Limits(
            seats=self._address.max_num_seqs,
            kv_tokens=self.health.load.kv_tokens or float("inf"),
            step_s=settings.step_s or float("inf"),
            margin=settings.margin,
            patience_s=settings.patience_s,
        )

    def _start(self, attempt: Attempt) -> None:
        del self._held[attempt.job.id]
        self._running[attempt.job.id] = attempt
        attempt.stage = "running"
        attempt.admitted_at = self._connection.now()
        attempt.admitted_tick = attempt.last_tick = perf_counter()
        self._vigil.began(attempt.last_tick)
        self._writer.send(
            attempt,
            sidecar.start(self._keys, attempt.held),
            lambda reply: self._started(attempt, reply),
        )
        self._pulse.started(attempt.name)
        assert self._group is not None
        attempt.task = self._group.create_task(self._serve(attempt), name=attempt.name)

    def _started(self, attempt: Attempt, reply: int) -> None:
        if reply == 0:
            self._meter.fenced.inc()
            attempt.halt(FENCED)
        elif reply == 2:
            attempt.halt(Stop("cancelled", "cancelled before it started"))

    # Serving.

    async def _serve(self, attempt: Attempt) -> None:
        """Let the engine answer; whatever comes of it, the attempt is brought to an end here."""
        error: EngineError | None = None
        try:
            error = await self._answered(attempt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if attempt.stop is None or task.uncancel() > 0:
                raise
        except Exception as bug:
            # The one door: a request that trips a bug must not take the others along.
            log.exception("serving_failed", request_id=attempt.job.id, endpoint=self.name)
            error = EngineError(f"the worker failed: {type(bug).__name__}: {bug}")
        self._served(attempt, error)

    async def _answered(self, attempt: Attempt) -> EngineError | None:
        """The engine's answer, all of it taken in; what was wrong with it, or nothing."""
        try:
            post = body.post(
                attempt.job, attempt.body, attempt.written, by_priority=self._address.by_priority
            )
            if not post.is_spent:
                await self._engine.ask(
                    post, attempt.answer, lambda more: self._heard(attempt, more=more)
                )
                attempt.answer.check(attempt.written)
        except EngineError as error:
            has_turned = self.health.failed(error)
            if is_broken(error):
                has_turned = await self._doubt() or has_turned
            if has_turned:
                await self._turned()
            return error
        return None

    async def _doubt(self) -> bool:
        """Ask the engine before anything more is sent to it; True if it has turned out to be away."""
        asked_tick = perf_counter()
        self._doubts += 1
        try:
            async with self._doubting:
                if self.health.away or self._doubted_tick > asked_tick:
                    return False
                await self.health.probe(is_doubted=True)
                self._doubted_tick = perf_counter()
                return bool(self.health.away)
        finally:
            self._doubts -= 1
            self._changed.set()

    def _heard(self, attempt: Attempt, *, more: bool) -> None:
        """The engine has sent something for this attempt; the hot path, once a token."""
        tick = perf_counter()
        self.health.heard(tick)
        if not more or attempt.stage != "running":
            return
        gap_s = tick - attempt.last_tick
        attempt.last_tick = tick
        if attempt.first_token_at is None:
            attempt.first_token_at = self._connection.now()
            attempt.first_tick = tick
            self._pulse.first_token(attempt.name, tick - attempt.admitted_tick)
            self.rhythm.first(attempt, tick)
            self._vigil.spoke(tick)
            self._changed.set()
            if attempt.job.stream:
                self._writer.note(attempt, is_urgent=True)
            return
        attempt.gap_max_s = max(attempt.gap_max_s, gap_s)
        self.rhythm.gap(attempt, gap_s, tick, self._running.values())
        if attempt.job.stream:
            self._writer.note(attempt, is_urgent=False)

    def _served(self, attempt: Attempt, error: EngineError | None) -> None:
        stop = attempt.stop
        if self._running.get(attempt.job.id) is attempt:
            del self._running[attempt.job.id]
        self._changed.set()
        self.rhythm.left(attempt, is_empty=not self._running)
        if stop is not None and stop.kind == "silent":
            error, stop = EngineError(stop.reason), None
            if self.health.failed(error):
                assert self._group is not None
                self._group.create_task(self._turned(), name=f"{self.name} turned")
        if stop is not None:
            self._stopped(attempt, stop)
        elif error is None:
            self.health.succeeded()
            self.rhythm.said(attempt.output_tokens)
            self._kv.computed(attempt.job, attempt.body)
            self._ending.finish(attempt, "completed")
        else:
            self._failed(attempt, error)

    # Ending.

    def _failed(self, attempt: Attempt, error: EngineError) -> None:
        if error.retryable and attempt.job.attempt < attempt.job.max_attempts:
            self._ending.give_back(attempt, str(error))
        else:
            self._ending.finish(attempt, "failed", str(error), status=error.status, is_dead=True)

    def _stop(self, attempt: Attempt, stop: Stop) -> None:
        """End it from outside, wherever it stands."""
        if attempt.stage == "running":
            attempt.halt(stop)
        elif attempt.stage == "held":
            self._held.pop(attempt.job.id, None)
            self._stopped(attempt, stop)

    def _stopped(self, attempt: Attempt, stop: Stop) -> None:
        if stop.kind == "fenced":
            self._forget(attempt)
        elif stop.kind == "returned":
            self._ending.give_back(attempt, stop.reason)
        elif stop.kind == "cancelled":
            self._ending.finish(attempt, "cancelled", stop.reason or "cancelled")
        else:
            assert stop.kind == "expired"
            self._ending.finish(attempt, "expired", stop.reason)

    async def _end_the_late(self) -> None:
        """Past their deadline, or given up by an engine that has gone silent."""
        for attempt, stop in self._vigil.over(
            list(self._attempts.values()), self.health.heard_tick
        ):
            self._stop(attempt, stop)
        reason = self._vigil.stalled(self._running.values(), self.health.heard_tick)
        if reason:
            if self.health.distrust(reason):
                await self._turned()
            for attempt in list(self._running.values()):
                attempt.halt(Stop("silent", reason))

    async def _turned(self) -> None:
        """The engine has gone or come back. The beat says so first: what is given back must not return at once."""
        with contextlib.suppress(StreamError):
            await self._pulse.beat_now()
        if self.health.away:
            self._return_held(f"engine away: {self.health.away}")
        else:
            self._kv.came(self.health.features.kv_events)
        self._changed.set()

    def _return_held(self, reason: str) -> None:
        for attempt in list(self._held.values()):
            self._stop(attempt, Stop("returned", reason))

    def _forget(self, attempt: Attempt) -> None:
        attempt.stage = "gone"
        self._held.pop(attempt.job.id, None)
        self._writer.drop(attempt)
        if self._attempts.get(attempt.job.id) is attempt:
            del self._attempts[attempt.job.id]
        if len(self._attempts) < self._settings.held_max:
            self._has_room.set()
        if not self._attempts:
            self._empty.set()

    def _drop_all(self) -> None:
        for attempt in list(self._attempts.values()):
            self._meter.fenced.inc()
            self._forget(attempt)
        self._running.clear()

    async def _is_forgotten(self) -> bool:
        """Whether Redis has lost our name (emptied, or failed over), rather than given it to another."""
        try:
            found = await self._connection.command("HGET", self._keys.endpoint(self.name), "epoch")
        except StreamError:
            return False
        return found is None

    # Telling.

    def _beat(self, started: tuple[str, ...], first_tokens: tuple[str, ...]) -> Beat:
        health, load, address = self.health, self.health.load, self._address
        kv = self._kv.account()
        says = self._says_what_it_holds()
        return Beat(
            endpoint=self.name,
            epoch=self._epoch,
            worker=self._worker,
            state=self.state,
            reason=self._draining or health.away,
            roles=address.roles,
            models=health.models,
            hardware=address.hardware,
            max_num_seqs=address.max_num_seqs,
            kv_tokens=load.kv_tokens,
            block_tokens=load.block_tokens,
            max_model_len=health.max_model_len,
            running=load.running,
            queued=load.queued,
            held=len(self._held),
            kv_usage=load.kv_usage,
            step_s=self.rhythm.step_s,
            scraped_at=health.load_at,
            engine=health.features.version,
            features=health.features.names,
            started=started,
            first_tokens=first_tokens,
            read_at=self._inbox.read_at if says else None,
            holds=self._said.names if says else (),
            holds_after=self._said.after if says else "",
            holds_to=self._said.to if says else "",
            kv_epoch=kv.epoch,
            kv_seq=kv.seq,
            kv_stored=kv.stored,
            kv_removed=kv.removed,
            kv_rest=kv.rest,
            kv_was_empty=kv.was_empty,
        )

    def _says_what_it_holds(self) -> bool:
        """Whether this beat does: one each `beat_s`, however many there are for the sake of news."""
        tick = perf_counter()
        if self._inbox.read_at is None or tick - self._said_tick < 0.9 * self._lease.beat_s:
            return False
        held = ((one.job.id, one.job.attempt) for one in self._attempts.values())
        self._said, self._said_tick = following(held, self._said), tick
        return True

    def _beaten(self, beat: Beat) -> None:
        if self._kv.told(beat.kv_epoch, beat.kv_seq):
            self._pulse.hurry()


async def _either(one: asyncio.Event, other: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(event.wait()) for event in (one, other)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
