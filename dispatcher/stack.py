"""All roles on one machine: Redis, dispatcher, workers and, where wanted, emulated engines.

Each is a process of its own, started as a sub-command, so that here nothing of the workers' floor is known.
"""

import asyncio
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import msgspec

from dispatcher import glance
from dispatcher.children import Child, Ready
from dispatcher.local import Server
from dispatcher.streams.connection import Connection, Where
from scheduler.errors import SettingsError, StreamError
from scheduler.keys import Keys
from scheduler.settings import Settings
from scheduler.sim import profile as gpus

PROFILES = ("h100", "a100", "l40s", "a30")
"The mixed fleet of `--emulate`, taken in turn."

KV_TRANSFER = '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'
"With which emulated engines hand KV over."

ROLES = ("prefill", "decode", "both")
"That an emulated engine can have."

BEATEN_S = 30.0
"How long the endpoints may take to their first beat after the workers are ready."

KNOCK_S = 0.05

LOOK_S = 0.2
"Between two looks whether the private Redis still runs."

AGAIN_S = 2.0
"After a start of it that failed."

GRACE_S = 10.0
"Beyond its own drain, how long a child may take to end."


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """A vLLM server to stand beside."""

    name: str
    url: str
    hardware: str = ""
    more: str = ""
    "Further settings as the worker's `--engine` takes them."

    @property
    def option(self) -> str:
        """As the worker's `--engine` takes it."""
        hardware = f"hardware={self.hardware}" if self.hardware else ""
        return ",".join(part for part in (f"{self.name}={self.url}", hardware, self.more) if part)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to start."""

    engines: tuple[Engine, ...] = ()
    "Those that run already."

    profiles: tuple[str, ...] = ()
    "One emulated engine each."

    roles: tuple[str, ...] = ()
    "Of the emulated engines: `prefill`, `decode` or `both`; empty: all serve whole requests, and hand no KV over."

    link_gbps: float = 100.0
    "Of each, where they have roles; in their own time."

    model: str = "emulated"
    time_scale: float = 1.0
    "Of the emulated engines: times faster than the wall clock."

    seed: int = 0
    jitter: float = 0.0
    "Spread of the emulated engines' coefficients, so that no prior is exactly right."

    workers: int = 1
    drain_s: float = 5.0
    door_port: int | None = None
    "Of the HTTP door; 0: a free one; None: no door."


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The line that says all of it is ready."""

    redis: str
    pool: str
    models: list[str]
    endpoints: list[Engine]
    metrics: dict[str, str]
    "Where each role's /metrics is."

    door: str
    "The HTTP door's URL; empty where there is none."

    pids: dict[str, int]
    logs: str


class Stack:
    """What `Wanted` asks for, running.

    1. `async with` starts Redis (unless one is given), the emulated engines, the dispatcher, the workers and the
       door, in this order, and returns when every endpoint has beaten.
    2. `watch` restarts who dies, until cancelled.
    3. Leaving closes the door, drains the workers, then ends the others.
    """

    def __init__(
        self,
        settings: Settings,
        wanted: Wanted,
        *,
        directory: Path,
        told: Callable[[str], None],
    ) -> None:
        """Start nothing yet; logs and the private Redis lie in the directory."""
        self._settings, self._wanted, self._told = settings, wanted, told
        self._directory = directory
        self._server = Server(
            given_url=settings.redis.login_url if settings.redis.url else "",
            directory=directory / "redis",
        )
        self._engines: list[Child] = []
        self._dispatchers: list[Child] = []
        self._workers: list[Child] = []
        self._door: Child | None = None
        self._endpoints: list[Engine] = []
        self._models: list[str] = []

    @property
    def settings(self) -> Settings:
        """The settings, with the Redis that is used."""
        redis = msgspec.structs.replace(self._settings.redis, url=self._server.unix_url)
        return msgspec.structs.replace(self._settings, redis=redis)

    @property
    def running(self) -> Running:
        """What runs where."""
        children = [child for child in self._children if child.pid is not None]
        pids = {child.name: child.pid or 0 for child in children}
        if self._server.pid is not None:
            pids["redis"] = self._server.pid
        return Running(
            redis=self._server.url if self._server.pid else self._settings.redis.shown_url,
            pool=self._settings.pool,
            models=self._models,
            endpoints=self._endpoints,
            metrics={
                child.name: f"http://127.0.0.1:{child.ready['metrics_port']}/metrics"
                for child in children
                if child.ready.get("metrics_port")
            },
            door=self._door.ready["url"] if self._door is not None else "",
            pids=pids,
            logs=str(self._directory),
        )

    async def __aenter__(self) -> Self:
        self._held = self._hold()
        try:
            self._server.start()
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    def _hold(self) -> TextIO:
        """The directory, ours alone: a second stack would write over our logs and take our endpoints from us."""
        shown = repr(str(self._directory))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            held = (self._directory / "up.lock").open("w", encoding="utf-8")
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"directory {shown} is in use by another headgate up, wanted one of its own: --directory"
            ) from None
        except OSError as error:
            raise SettingsError(f"directory {shown} cannot be used: {error.strerror}") from None
        return held

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def watch(self) -> None:
        """Restart who dies, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for child in self._children:
                tasks.create_task(child.watch(self._told))
            tasks.create_task(self._watch_redis())

    async def _watch_redis(self) -> None:
        """What was written is on its disk: it comes back with it, where it was."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._server.has_ended:
                continue
            self._told(f"redis ended, starting it again; {self._directory / 'redis'}")
            try:
                self._server.start()  # on the loop's own thread, as it wants
            except StreamError as error:
                self._told(str(error))
                await asyncio.sleep(AGAIN_S)

    @property
    def _children(self) -> list[Child]:
        doors = [self._door] if self._door is not None else []
        return [*self._engines, *self._dispatchers, *self._workers, *doors]

    async def _start(self) -> None:
        counts: Counter[str] = Counter()
        for profile in self._wanted.profiles:
            name = f"{profile}-{counts[profile]}"
            counts[profile] += 1
            self._engines.append(self._child(name, self._emulator(profile, len(self._engines))))
        leader, standby = (
            self._child(name, lambda _: ["dispatcher"]) for name in ("dispatcher", "standby")
        )
        self._dispatchers = [leader]
        await _together([child.start() for child in [*self._engines, leader]])
        # A death is seen and mended here; only a standby mends a leader that freezes.
        self._dispatchers.append(standby)
        # At another speed than the real one the prior for that hardware would be wrong by just as much.
        is_real = self._wanted.time_scale == 1.0
        emulated = [
            Engine(
                name=child.name,
                url=child.ready["url"],
                hardware=profile if is_real else "",
                more=self._role(number),
            )
            for number, (child, profile) in enumerate(
                zip(self._engines, self._wanted.profiles, strict=True)
            )
        ]
        self._endpoints = [*self._wanted.engines, *emulated]
        if not self._endpoints:
            raise SettingsError("no engine: wanted --emulate N or --engine NAME=URL")
        shares = [self._endpoints[n :: self._wanted.workers] for n in range(self._wanted.workers)]
        self._workers = [
            self._child(f"worker-{n}", self._worker(share))
            for n, share in enumerate(shares)
            if share
        ]
        if self._wanted.door_port is not None:
            self._door = self._child("door", self._door_words(self._wanted.door_port))
        doors = [self._door] if self._door is not None else []
        await _together([child.start() for child in [standby, *self._workers, *doors]])
        await self._await_beats()

    def _door_words(self, port: int) -> Callable[[Ready | None], list[str]]:
        def words(before: Ready | None) -> list[str]:
            # Started again it must be found where it was.
            bound = before["url"].rpartition(":")[2] if before else str(port)
            return ["door", "--port", bound, "--drain-s", str(self._wanted.drain_s)]

        return words

    def _child(self, name: str, words: Callable[[Ready | None], Sequence[str]]) -> Child:
        settings = self.settings
        environ = os.environ | {
            "HEADGATE_REDIS_URL": settings.redis.url,
            "HEADGATE_REDIS__PREFIX": settings.redis.prefix,
            "HEADGATE_POOL": settings.pool,
        }
        return Child(name, words, environ=environ, directory=self._directory)

    def _emulator(self, profile: str, number: int) -> Callable[[Ready | None], list[str]]:
        wanted = self._wanted
        options: dict[str, Any] = (
            {}
            if not wanted.roles
            else {
                "kv-transfer-config": KV_TRANSFER,
                "link-gbps": wanted.link_gbps,
            }
        )
        options |= {
            "profile": profile,
            "model": wanted.model,
            "time-scale": wanted.time_scale,
            "seed": wanted.seed + number,
            "jitter": wanted.jitter,
        }

        def words(before: Ready | None) -> list[str]:
            # Started again it must be found where it was.
            port = before["url"].rpartition(":")[2].strip("/") if before else 0
            said = options | {"port": port}
            return ["emulate", *(part for k, v in said.items() for part in (f"--{k}", str(v)))]

        return words

    def _role(self, number: int) -> str:
        """What the worker is to say of an emulated engine's part in requests of two legs."""
        wanted = self._wanted
        if not wanted.roles:
            return ""
        token_bytes = gpus.load(wanted.profiles[number]).kv_bytes_per_token
        link_gbps = wanted.link_gbps * wanted.time_scale
        return f"roles={wanted.roles[number]},link_gbps={link_gbps:g},kv_token_bytes={token_bytes}"

    def _worker(self, share: Sequence[Engine]) -> Callable[[Ready | None], list[str]]:
        engines = [part for engine in share for part in ("--engine", engine.option)]
        return lambda _: ["worker", "--drain-s", str(self._wanted.drain_s), *engines]

    async def _await_beats(self) -> None:
        """Return when every endpoint has beaten as ready, and somebody leads."""
        names = {engine.name for engine in self._endpoints}
        where = Where.of(self.settings.redis, url=self.settings.redis.login_url)
        connection = await Connection.connect(where)
        keys = Keys(self._settings.redis.prefix, self._settings.pool)
        try:
            async with asyncio.timeout(BEATEN_S):
                while True:
                    seen = await glance.pool(connection, keys)
                    alive = {e.beat.endpoint: e.beat for e in seen.endpoints if e.is_alive}
                    if seen.leader and all(
                        name in alive and alive[name].state == "ready" for name in names
                    ):
                        break
                    await asyncio.sleep(KNOCK_S)
        except TimeoutError:
            silent = ", ".join(sorted(names - set(alive))) or "none"
            away = ", ".join(f"{n}: {b.reason}" for n, b in alive.items() if b.state != "ready")
            raise StreamError(
                f"not ready after {BEATEN_S:g} s: silent {silent}; away {away or 'none'}; "
                f"leader {seen.leader or 'none'}; logs in {self._directory}"
            ) from None
        finally:
            await connection.close()
        self._models = sorted({model for beat in alive.values() for model in beat.models})

    async def _stop(self) -> None:
        grace_s = self._wanted.drain_s + GRACE_S
        if self._door is not None:
            await self._door.stop(grace_s=grace_s)
        await _together([child.stop(grace_s=grace_s) for child in self._workers])
        ended = [*self._workers, self._door]
        others = [child for child in self._children if child not in ended]
        await _together([child.stop(grace_s=GRACE_S) for child in others])
        if self._server.was_started_here:
            await asyncio.to_thread(self._server.stop)
        self._held.close()


async def _together(works: Sequence[Any]) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(work)
    except* StreamError as group:
        raise group.exceptions[0] from None
