"""The worker's process: its engines, the one writer to Redis, its metrics and its end."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterable

import msgspec
import structlog

from dispatcher.streams.connection import Connection, Where
from scheduler.errors import FencedError, SettingsError
from scheduler.keys import Keys
from scheduler.settings import EngineAddress, Settings
from workers import metrics
from workers.endpoint import Endpoint
from workers.engine import checked
from workers.metrics import Meter
from workers.writer import Writer

SETTLE_S = 5.0
"After a drain, how long the last moves may take to reach Redis; then the leases say the rest."

log = structlog.get_logger()


class Worker:
    """All that runs in one process. `run` ends after `stop`, or when newer workers have taken every name."""

    def __init__(self, settings: Settings) -> None:
        if not settings.worker.engines:
            raise SettingsError("worker.engines is empty, wanted at least one: --engine NAME=URL")
        if not settings.redis.url:
            raise SettingsError("redis.url is empty, wanted the pool's Redis: --redis URL")
        for engine in settings.worker.engines:
            checked(engine.url, engine.name)
        self.name = settings.worker.name or f"{socket.gethostname()}-{os.getpid()}"
        self._settings = settings
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()
        self.endpoints: list[Endpoint] = []
        self.metrics_port = 0
        "Where it serves /metrics, once it works."

    def stop(self) -> None:
        """Drain and end; said twice, give back at once what still runs."""
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Work. `ready` is called once jobs can come.

        Raises:
            StreamError: Redis cannot be reached at the start.
            FencedError: newer workers have joined in every name of ours.
        """
        settings = self._settings
        redis = settings.redis
        connection = await Connection.connect(Where.of(redis, url=redis.login_url))
        try:
            keys = Keys(settings.redis.prefix, settings.pool)
            meter = Meter()
            writer = Writer(connection, keys, settings.worker, meter)
            self.endpoints = [
                self._endpoint(address, connection, writer, keys, meter)
                for address in settings.worker.engines
            ]
            async with contextlib.AsyncExitStack() as stack:
                runner = await metrics.serve(
                    meter,
                    settings.worker.metrics_port,
                    is_ready=self._is_ready,
                    refresh=self._show,
                )
                stack.push_async_callback(runner.cleanup)
                self.metrics_port = int(runner.addresses[0][1])
                await self._work(writer, ready)
        finally:
            await connection.close()

    async def _work(self, writer: Writer, ready: Callable[[], None]) -> None:
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(writer.run(), name="writer")
            working = [
                group.create_task(endpoint.run(), name=endpoint.name) for endpoint in self.endpoints
            ]
            ready()
            stopping = group.create_task(self._stopping.wait(), name="stop")
            everything = asyncio.gather(*working)
            waited: list[asyncio.Future[object]] = [stopping, everything]  # type: ignore[list-item]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            was_told = self._stopping.is_set()
            if was_told:
                await self._drain(writer)
            for task in (stopping, writing, *working):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await everything
        if not was_told:
            raise FencedError("newer workers have joined in the name of every endpoint here")

    async def _drain(self, writer: Writer) -> None:
        drain_s = self._settings.worker.drain_s
        log.info("draining", worker=self.name, drain_s=drain_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s + SETTLE_S):
                async with asyncio.TaskGroup() as group:
                    for endpoint in self.endpoints:
                        group.create_task(endpoint.drain(drain_s, self._hurrying))
                await writer.settled()
        log.info("drained", worker=self.name)

    def _endpoint(
        self,
        address: EngineAddress,
        connection: Connection,
        writer: Writer,
        keys: Keys,
        meter: Meter,
    ) -> Endpoint:
        return Endpoint(
            address,
            connection=connection,
            writer=writer,
            keys=keys,
            settings=self._settings.worker,
            lease=self._settings.lease,
            meter=meter,
            worker=self.name,
        )

    def _is_ready(self) -> bool:
        return any(endpoint.state == "ready" for endpoint in self.endpoints)

    def _show(self) -> None:
        for endpoint in self.endpoints:
            endpoint.show()


async def serve(settings: Settings, ready: Callable[[Worker], None]) -> None:
    """Run a worker until SIGTERM or SIGINT has drained it."""
    worker = Worker(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    await worker.run(lambda: ready(worker))


def address(text: str) -> EngineAddress:
    """An engine as the command line names it: NAME=URL, then more of its settings after commas.

    >>> address("a0=http://127.0.0.1:8000,hardware=a100,max_num_seqs=64").max_num_seqs
    64

    Raises:
        SettingsError: it is none.
    """
    name, _, rest = text.partition("=")
    url, *more = rest.split(",")
    fields: dict[str, object] = {"name": name, "url": url}
    for part in more:
        key, equals, value = part.partition("=")
        if not equals:
            raise SettingsError(f"engine is {text!r}: {part!r} is no SETTING=VALUE")
        fields[key] = value.split("+") if key in ("roles", "models") else value
    return _converted(fields, text)


def with_engines(settings: Settings, texts: Iterable[str]) -> Settings:
    """The settings with these engines in place of the file's, where there are any."""
    engines = tuple(address(text) for text in texts)
    if not engines:
        return settings
    try:
        worker = msgspec.structs.replace(settings.worker, engines=engines)
    except ValueError as error:
        raise SettingsError(f"worker: {error}") from None
    return msgspec.structs.replace(settings, worker=worker)


def _converted(fields: dict[str, object], text: str) -> EngineAddress:
    try:
        found = msgspec.convert(fields, EngineAddress, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(
            f"engine is {text!r}: {error}; wanted NAME=URL[,SETTING=VALUE]"
        ) from None
    if not found.url:
        raise SettingsError(f"engine is {text!r}, wanted NAME=URL")
    return found
