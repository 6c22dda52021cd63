"""One engine's worker: takes its jobs, admits them to the engine, and brings each to its one end.

    1. join     a new epoch; whoever worked in this name before is fenced
    2. read     jobs arrive with their bodies and what earlier attempts wrote (`inbox`)
    3. admit    as many as the promises of the batch allow (`scheduler.batching`)
    4. serve    `start` and POST in the same moment; tokens to the log as they come (`serving`)
    5. end      one terminal move, or the request goes back to be tried elsewhere

Silence at every point has a bound, and nothing ends without a reply from Redis or a newer lease.
"""

import asyncio
import contextlib

import structlog

from dispatcher.streams.connection import Connection
from dispatcher.streams.where import without_password
from scheduler.errors import FencedError, StreamError, WireError
from scheduler.keys import Keys
from scheduler.settings import EngineAddress, LeaseSettings, WorkerSettings
from scheduler.wire.words import EndpointState
from scheduler.wire.worker import Beat
from workers import body, epoch
from workers.admission import Admission
from workers.attempt import FENCED, STALE, Attempt, Stop
from workers.ending import Ending
from workers.engine import Engine
from workers.epoch import RETRY_S
from workers.hands import Hands
from workers.health import Health
from workers.inbox import Arrival, Inbox
from workers.kv_cache import KvCache
from workers.metrics import Gaps, Meter
from workers.pulse import Pulse
from workers.rhythm import Rhythm
from workers.serving import Serving
from workers.telling import Telling
from workers.vigil import Vigil
from workers.writer import Writer

TEND_S = 0.1
"How often the held are tried again: what they promised weighs more the longer they wait."

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
        self._hands = Hands(settings.held_max)
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
            kv_s=lease.kv_s,
        )
        self._epoch = 0
        self._admission = Admission(
            address,
            settings,
            health=self.health,
            rhythm=self.rhythm,
            hands=self._hands,
            clock=connection.now,
        )
        self._changed = asyncio.Event()
        self._vigil = Vigil(settings, connection.now, self._changed.set)
        self._telling = Telling(
            address,
            worker=worker,
            beat_s=lease.beat_s,
            health=self.health,
            rhythm=self.rhythm,
            hands=self._hands,
            inbox=self._inbox,
            kv=self._kv,
        )
        self._serving = Serving(
            address,
            engine=self._engine,
            keys=keys,
            writer=writer,
            hands=self._hands,
            health=self.health,
            rhythm=self.rhythm,
            vigil=self._vigil,
            pulse=self._pulse,
            kv=self._kv,
            ending=self._ending,
            meter=meter,
            clock=connection.now,
            changed=self._changed,
            turned=self._turned,
        )
        self._draining = ""

    @property
    def state(self) -> EndpointState:
        """As its beats say it."""
        if self._draining:
            return "draining"
        return "away" if self.health.away else "ready"

    async def run(self) -> None:
        """Work until cancelled, or until a newer worker joins in this name."""
        url = without_password(self._address.url)
        pool = self._connection, self._keys
        await self._engine.open()
        try:
            while True:
                self._epoch = await epoch.join(*pool, self.name, self._worker)
                log.info("joined", endpoint=self.name, epoch=self._epoch, url=url)
                await self._live()
                self._drop_all()
                if not await epoch.is_forgotten(*pool, self.name, self._epoch):
                    # So that no probe finds it ready.
                    self._draining = "a newer worker has joined in its name"
                    log.warning("stood_down", endpoint=self.name, epoch=self._epoch)
                    return
                log.warning("redis_forgot_us", endpoint=self.name, epoch=self._epoch)
        finally:
            await self._engine.close()

    async def _live(self) -> None:
        """One epoch: until cancelled, or until the beat is fenced."""
        task = asyncio.current_task()
        assert task is not None
        try:
            # A task of its own: a group that fails leaves its own cancel counted with its parent (Python 3.11), and
            # ours must count only what others ask of us.
            await asyncio.create_task(self._work(), name=f"{self.name} {self._epoch}")
        except* FencedError as fenced:
            log.debug("fenced", endpoint=self.name, reason=str(fenced.exceptions[0]))
        if task.cancelling():  # it came with the fence, and the group tells the failure alone
            raise asyncio.CancelledError

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._serving.group = group
            tasks = (self._read, self._tend, self._pulse.run, self._watch, self._adopt)
            for task in (*tasks, self._kv.run):
                group.create_task(task(), name=f"{self.name} {task.__qualname__}")

    async def drain(self, drain_s: float, hurry: asyncio.Event) -> None:
        """Take nothing new, give the held back, let the running finish for so long, give back the rest."""
        self._draining = "the worker was told to end"
        self._pulse.hurry()
        self._return_held(self._draining)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await _either(self._hands.empty, hurry)
        for attempt in list(self._hands.running.values()):
            attempt.halt(Stop("returned", self._draining))
        await self._hands.empty.wait()

    def show(self) -> None:
        """Bring the gauges up to date."""
        self._meter.held.labels(self.name).set(len(self._hands.held))
        self._meter.running.labels(self.name).set(len(self._hands.running))
        self._meter.is_ready.labels(self.name).set(self.state == "ready")
        self._meter.step_law(self.name, self.rhythm.step_time)

    # The tasks.

    async def _read(self) -> None:
        while True:
            await self._hands.has_room.wait()
            try:
                await self._inbox.read(self._hands.room, self._came)
                await self._take()
                await asyncio.sleep(0)  # what came is posted before more is asked for
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
                await self._inbox.adopt(len(self._hands.all))
                await self._take()

    async def _tend(self) -> None:
        """Admit the held when anything changes; look after deadlines and silences when one may be over.

        Whoever changes something wakes it only where somebody is held, and a lonely request has its engine to itself.
        """
        while True:
            wait_s = min(self._vigil.due_s(), TEND_S if self._hands.held else float("inf"))
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

    def _came(self) -> None:
        """A job that comes alone is on its way to the engine before any other task has its turn."""
        if self._vigil.due_s() <= 0:
            return
        arrival = self._inbox.take_one(self._epoch, self._hands.knows)
        if arrival is not None:
            self._arrive(arrival)
            self._admit()
            if self._hands.held:
                self._changed.set()

    async def _take(self) -> None:
        arrivals = await self._inbox.take(self._epoch, self._cancel, self._hands.knows)
        for arrival in arrivals:
            self._arrive(arrival)
        if arrivals:
            # Here, not when `_tend` has its turn: what may run at once is on its way before anything else is done.
            if self._vigil.due_s() <= 0:
                await self._end_the_late()
            self._admit()
            self._changed.set()

    def _arrive(self, arrival: Arrival) -> None:
        job = arrival.held.job
        older = self._hands.all.get(job.id)
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
        attempt.expect(self.rhythm.answers.usual_tokens)
        self._hands.take(attempt)
        self._vigil.arrived(attempt)
        # A decode leg follows its prefill leg, and repeats nothing.
        if job.attempt > 1 and job.leg != "decode":
            self._meter.retries.labels(self.name).inc()
        if arrival.cancelled is not None:
            self._ending.stopped(attempt, Stop("cancelled", arrival.cancelled))
            return
        if arrival.trouble:
            self._ending.give_back(attempt, arrival.trouble)
            return
        if not arrival.raw_body:
            trouble = (
                "it has no body: the field 'body' is empty, and its claim check "
                f"{self._keys.body(job.id)} was never written or has run out"
            )
        if trouble:
            self._ending.finish(attempt, "invalid", trouble, is_dead=True)
        elif self._draining or self.health.away:
            self._ending.give_back(attempt, self._draining or f"engine away: {self.health.away}")
        else:
            self._hands.hold(attempt)

    def _cancel(self, request_id: str, reason: str) -> None:
        attempt = self._hands.all.get(request_id)
        if attempt is not None:
            self._stop(attempt, Stop("cancelled", reason))

    # Admitting.

    def _admit(self) -> None:
        if self._draining or self._pulse.has_lapsed:
            return
        for attempt in self._admission.chosen():
            if attempt.kv_until_at is not None and self._connection.now() >= attempt.kv_until_at:
                self._stop(attempt, STALE)
            else:
                self._serving.start(attempt)

    # Ending.

    def _stop(self, attempt: Attempt, stop: Stop) -> None:
        """End it from outside, wherever it stands."""
        if attempt.stage == "running":
            attempt.halt(stop)
        elif attempt.stage == "held":
            self._hands.held.pop(attempt.job.id, None)
            self._ending.stopped(attempt, stop)

    async def _end_the_late(self) -> None:
        """Past their deadline, or given up by an engine that has gone silent."""
        for attempt, stop in self._vigil.over(
            list(self._hands.all.values()), self.health.heard_tick
        ):
            self._stop(attempt, stop)
        reason = self._vigil.stalled(self._hands.running.values(), self.health.heard_tick)
        if reason:
            if self.health.distrust(reason):
                await self._turned()
            for attempt in list(self._hands.running.values()):
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
        for attempt in list(self._hands.held.values()):
            self._stop(attempt, Stop("returned", reason))

    def _forget(self, attempt: Attempt) -> None:
        self._hands.forget(attempt)
        self._writer.drop(attempt)

    def _drop_all(self) -> None:
        for attempt in list(self._hands.all.values()):
            self._meter.fenced.inc()
            self._forget(attempt)
        self._hands.running.clear()

    # Telling.

    def _beat(self, started: tuple[str, ...], first_tokens: tuple[str, ...]) -> Beat:
        reason = self._draining or self.health.away
        return self._telling.beat(self._epoch, self.state, reason, started, first_tokens)

    def _beaten(self, beat: Beat) -> None:
        if self._kv.told(beat.kv_epoch, beat.kv_seq):
            self._pulse.hurry()


async def _either(one: asyncio.Event, other: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(event.wait()) for event in (one, other)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
