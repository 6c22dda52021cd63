"""One dispatcher process: a standby that becomes the leader, and a leader that stands down.

1. connect            Redis may be away: a standby waits
2. win the lease      `leader`
3. take over          `recovery`: what was learned, who lives, where every request stands
4. reign              `loop` turns, `upkeep` tidies, `leader` renews
5. stand down         fenced: back to 2; stopped: save, resign and leave
"""

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import structlog

from dispatcher import journal, plugins
from dispatcher.delivery import Delivery
from dispatcher.exposition import Exposition
from dispatcher.intake import Intake
from dispatcher.journal import Core, Journal, Recorder
from dispatcher.leader import Lease
from dispatcher.loop import Loop
from dispatcher.metrics import Meter
from dispatcher.moves import Moves
from dispatcher.recovery import Recovery
from dispatcher.streams.connection import Connection
from dispatcher.upkeep import Upkeep
from dispatcher.web import Pages
from scheduler import parsing, policies
from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import FencedError, StreamError
from scheduler.keys import Keys
from scheduler.plan import PlanSettings
from scheduler.policies import Policy, Urgency
from scheduler.profile import profile as profiles
from scheduler.profile.parts import Part
from scheduler.settings import Settings
from scheduler.view import View

STUCK_S = 10.0
"A loop that has neither turned nor waited for Redis for so long is stuck: restart it."

BEATS_BACK = 2.0
"At a takeover beats of so many leases ago are read: older ones speak of endpoints that are lost."

log = structlog.get_logger()


class Node:
    """One process of the dispatcher, for one pool."""

    def __init__(self, connection: Connection, settings: Settings, *, name: str) -> None:
        """`name` must be this process's own: entries are claimed and the lease is held under it."""
        self._connection = connection
        self._settings = settings
        self._name = name
        self._keys = Keys(settings.redis.prefix, settings.pool)
        self._core_settings = core_settings(settings)
        self._lease = Lease(connection, self._keys, node=name, ttl_s=settings.lease.leader_s)
        self._meter = Meter()
        self._core: Scheduler | None = None
        self._pen: Journal | None = None
        self._delivery = Delivery(connection, on_wait=self._meter.beat)
        self._is_leader = False

    async def run(self) -> None:
        """Stand by and lead, in turn, until cancelled."""
        while True:
            try:
                epoch = await self._lease.win()
            except asyncio.CancelledError:
                await self._lease.resign()  # it may have been granted in this very moment
                raise
            try:
                # A task of its own: a group that fails leaves its own cancel counted with its parent (Python 3.11),
                # and ours must count only what others ask of us.
                await asyncio.create_task(self._reign(epoch), name=f"reign {epoch}")
            except* (FencedError, StreamError) as group:
                log.warning("stood_down", epoch=epoch, reasons=[str(e) for e in _leaves(group)])
            finally:
                self._core, self._is_leader = None, False
            _end_if_cancelled()

    @property
    def pages(self) -> Pages:
        """What the web face says of this node."""
        exposition = Exposition(self._meter, self, pool=self._settings.pool)
        return Pages(unhealthy=self._unhealthy, unready=self._unready, metrics=exposition.text)

    @property
    def is_leader(self) -> bool:
        """Whether this node leads."""
        return self._is_leader

    @property
    def is_recording(self) -> bool | None:
        """Whether this reign's journal is still written; None where none is kept."""
        if not self._settings.loop.journal:
            return None
        return self._pen is not None and self._pen.is_open

    @property
    def round_trips(self) -> int:
        """How often this process asked Redis to move something."""
        return self._delivery.round_trips

    def view(self) -> View | None:
        """The core's account; None for a standby."""
        return self._core.view(self._connection.now()) if self._core is not None else None

    async def _reign(self, epoch: int) -> None:
        began_at = time.monotonic()
        core = Scheduler(self._core_settings, np.random.default_rng(epoch))
        pen = self._pen = self._journal(epoch)
        loop = self._loop(core if pen is None else Recorder(core, pen), epoch)
        upkeep = self._upkeep(epoch)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._lease.keep(epoch))
                lease_s = self._settings.lease.worker_s
                await (
                    upkeep.trim_logs()
                )  # or a Redis that is full would refuse the takeover, for ever
                is_warm = await loop.take_over(
                    beats_since=self._connection.now() - BEATS_BACK * lease_s
                )
                self._core, self._is_leader = core, True
                self._meter.reigns += 1
                self._meter.beat()
                log.info("leads", epoch=epoch, is_warm=is_warm, after_s=time.monotonic() - began_at)
                tasks.create_task(loop.run())
                tasks.create_task(upkeep.run())
                tasks.create_task(self._save(loop, upkeep))
        except asyncio.CancelledError:
            await self._keep(loop, upkeep)
            raise
        finally:
            if pen is not None:
                pen.close("resigned")
            self._pen = None
            await self._lease.resign(epoch)
            log.info("resigned", epoch=epoch)

    def _journal(self, epoch: int) -> Journal | None:
        settings = self._settings.loop
        if not settings.journal:
            return None
        return journal.begin(
            settings.journal,
            self._core_settings,
            pool=self._settings.pool,
            epoch=epoch,
            version=metadata.version("headgate"),
            now=self._connection.now(),
            bytes_max=settings.journal_bytes,
        )

    async def _save(self, loop: Loop, upkeep: Upkeep) -> None:
        while True:
            await asyncio.sleep(self._settings.loop.snapshot_every_s)
            try:
                await upkeep.save(loop.saved())
            except FencedError:
                raise
            except StreamError as error:
                log.warning("snapshot_not_saved", reason=str(error))

    async def _keep(self, loop: Loop, upkeep: Upkeep) -> None:
        """What was decided last, and what was learned."""
        if not self._is_leader:
            return  # before the takeover's end there is nothing worth more than what is kept
        try:
            await loop.log_reasons()
            await upkeep.save(loop.saved())
        except StreamError as error:
            log.warning("snapshot_not_saved", reason=str(error))

    def _loop(self, core: Core, epoch: int) -> Loop:
        settings = self._settings
        reader = Intake(self._keys, body_bytes=settings.limits.body_bytes)
        moves = Moves(
            self._keys,
            epoch,
            reader,
            objectives=settings.objectives,
            retention_s=settings.loop.retention_s,
        )
        recovery = Recovery(
            self._connection,
            self._keys,
            node=self._name,
            reader=reader,
            moves=moves,
            delivery=self._delivery,
        )
        return Loop(
            self._connection,
            self._keys,
            core,
            node=self._name,
            settings=settings.loop,
            reader=reader,
            moves=moves,
            recovery=recovery,
            delivery=self._delivery,
            meter=self._meter,
        )

    def _upkeep(self, epoch: int) -> Upkeep:
        return Upkeep(
            self._connection,
            self._keys,
            epoch,
            node=self._name,
            retention_s=self._settings.loop.retention_s,
            body_ttl_s=self._settings.limits.body_ttl_s,
            meter=self._meter,
        )

    def _unhealthy(self) -> str:
        silent_s = time.monotonic() - self._meter.turned_at
        if self._is_leader and silent_s > STUCK_S:
            return f"the loop has not turned for {silent_s:.1f} s"
        return ""

    def _unready(self) -> str:
        silent_s = self._connection.now() - self._lease.asked_at
        if silent_s > self._settings.lease.leader_s:
            return f"redis at {self._connection.shown} has not answered for {silent_s:.1f} s"
        return ""


def own_name() -> str:
    """A name that no other living process of this fleet has, and that people recognise."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _end_if_cancelled() -> None:
    """Obey a cancel that came while a task of the group failed: the group tells the failure alone (Python 3.11)."""
    task = asyncio.current_task()
    assert task is not None
    if task.cancelling():
        raise asyncio.CancelledError


def core_settings(settings: Settings) -> CoreSettings:
    """The core's part of the settings.

    Raises:
        SettingsError: the policy, or a part of the profile, is unknown or misses a setting of its own.
    """
    found = plugins.chosen(settings.policy, settings.profile)
    parts = [kind for kind in found if issubclass(kind, Part)]
    return CoreSettings(
        policy=_policy(settings.policy, [kind for kind in found if issubclass(kind, Policy)]),
        profile=profiles.decode(settings.profile, parts) if settings.profile else None,
        plan=_plan(settings.plan),
        objectives=settings.objectives,
        fairness=settings.fairness,
        lease_s=settings.lease.worker_s,
        kv_lease_s=settings.lease.kv_s,
        waiting_max=settings.limits.waiting_max,
    )


def _policy(table: dict[str, object], plug_ins: Sequence[type[Policy]]) -> Policy:
    if not table:
        return Urgency()
    found = parsing.build(table, policies.union(tuple(plug_ins)), ("policy",))
    assert isinstance(found, Policy)
    return found


def _plan(table: dict[str, object]) -> PlanSettings:
    found = parsing.build(table, PlanSettings, ("plan",))
    assert isinstance(found, PlanSettings)
    return found


def _leaves(group: BaseExceptionGroup[Exception]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
