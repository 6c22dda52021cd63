"""The door's HTTP: routes, one place where every error gets OpenAI's shape, and the life of a request.

1. read        within `read_s` and `body_bytes`, or 408 and 413 (half a head: closed, see `punctual`)
2. understand  who asks, for what, with which wishes (`keyring`, `ask`, `headers`)
3. hand in     one move into the pool's `requests` stream (`desk`)
4. answer      whole or as a stream (`answer`)
5. leave       a client that went away takes its request with it
"""

import asyncio
import importlib.metadata
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter

import msgspec
import structlog
from aiohttp import web
from aiohttp.http import HttpProcessingError

from dispatcher.client.client import Client
from dispatcher.client.handle import Handle
from dispatcher.door import answer, refusal
from dispatcher.door import ask as asks
from dispatcher.door.answer import Stream
from dispatcher.door.ask import Ask
from dispatcher.door.desk import Desk
from dispatcher.door.keyring import Keyring
from dispatcher.door.meter import Meter
from dispatcher.door.punctual import Site
from dispatcher.door.refusal import Refusal
from dispatcher.door.roster import Model, Roster
from dispatcher.web import Pages
from scheduler.errors import SettingsError
from scheduler.settings import DoorSettings, Settings
from scheduler.wire.words import PATHS

BACKLOG = 1024
"Connections the kernel keeps while the loop is busy."

MODELS = "/v1/models"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger()


class _Briefly(logging.Filter):
    """One line of ours for whoever does not speak HTTP; aiohttp shows where in its parser it noticed."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            log.info("no_http", reason=" ".join(str(error).split())[:200])
            return False
        return True


_complaints = logging.getLogger("headgate.door")
_complaints.addFilter(_Briefly())


class Door:
    """A door of one pool, on a client that is connected.

    1. `served` listens while its block runs; leaving it lets open requests finish for `drain_s`.
    2. What is still open then is cancelled, as if its client had gone.
    """

    def __init__(self, client: Client, settings: Settings, keyring: Keyring) -> None:
        """Listen to nobody yet."""
        self._keyring = keyring
        self._settings: DoorSettings = settings.door
        self._body_bytes = settings.limits.body_bytes
        self._meter = Meter()
        self._roster = Roster(client.connection, client.keys, lease_s=settings.lease.worker_s)
        self._desk = Desk(client, self._roster, self._meter)
        self._open = 0
        self._is_draining = False

    @property
    def pages(self) -> Pages:
        """What the door says of itself."""
        return Pages(unhealthy=lambda: "", unready=self._unready, metrics=self._meter.text)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[int]:
        """Serve while the block runs; the port.

        Raises:
            SettingsError: the port or the certificate cannot be had.
        """
        runner = web.AppRunner(
            self._application(),
            handler_cancellation=True,
            shutdown_timeout=self._settings.drain_s,
        )
        looking = asyncio.create_task(self._roster.run(), name="headgate-roster")
        try:
            await runner.setup()
            yield await self._listen(runner)
        finally:
            self._is_draining = True
            await runner.cleanup()
            await self._desk.close()
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _listen(self, runner: web.AppRunner) -> int:
        settings = self._settings
        site = Site(
            runner,
            settings.host,
            settings.port,
            head_s=settings.read_s,
            backlog=BACKLOG,
            ssl_context=_tls(settings),
            logger=_complaints,
        )
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(
                f"door.port is {settings.port} on {settings.host}, wanted a free one: {reason}"
            ) from None
        return int(runner.addresses[0][1])

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=self._body_bytes, middlewares=[self._guarded])
        for path in PATHS:
            app.router.add_post(path, self._generate)
        app.router.add_get(MODELS, self._models)
        app.router.add_get(MODELS + "/{model:.+}", self._model)
        app.router.add_get("/version", self._version)
        app.router.add_get("/health", self._health)
        self.pages.add_to(app)
        return app

    def _unready(self) -> str:
        return "draining" if self._is_draining else self._roster.trouble

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The one door of errors; every answer is counted here."""
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else "other"
        began_at = perf_counter()
        try:
            if path.startswith("/v1/"):
                self._keyring.tenant(request.headers)
            response = await handler(request)
            self._meter.answers.labels(path, response.status, "").inc()
        except Refusal as error:
            response = self._refused(error, path)
        except web.HTTPException as error:
            response = self._refused(self._of_http(error, request), path)
        except ConnectionResetError:
            raise  # the client is gone, and `desk` has counted it
        except Exception:
            log.exception("request_failed", path=path)
            bug = Refusal(500, "bug", "the door failed; its log says why")
            response = self._refused(bug, path)
        if path in PATHS:
            self._meter.whole.observe(perf_counter() - began_at)
        return response

    def _refused(self, error: Refusal, path: str) -> web.Response:
        self._meter.answers.labels(path, error.status, error.reason).inc()
        return _json(error.body(), error.status, error.headers)

    def _of_http(self, error: web.HTTPException, request: web.Request) -> Refusal:
        """What aiohttp itself refuses."""
        if error.status in (404, 405):
            found = f"{request.method} {request.path[:100]}"
            served = f"POST {', POST '.join(PATHS)}, GET {MODELS}"
            refused = Refusal(
                error.status, "unknown_path", f"{found} is not served, wanted one of {served}"
            )
            if isinstance(error, web.HTTPMethodNotAllowed):
                refused.beside["Allow"] = error.headers["Allow"]
            return refused
        if error.status == 413:
            return Refusal(413, "too_large", f"the body is over {self._body_bytes} bytes")
        return Refusal(error.status, "invalid", error.reason)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        began_at = perf_counter()
        with self._counted():
            raw = await self._read(request)
            ask = asks.understand(raw, request.path, request.headers)
            tenant = self._keyring.tenant(request.headers)
            self._keyring.check_name(ask.name, tenant)
            async with self._desk.handed_in(ask, raw, tenant=tenant) as handle:
                try:
                    return await self._answered(request, ask, handle, began_at)
                except Refusal as error:
                    error.beside |= answer.named(ask, handle)
                    raise

    async def _answered(
        self, request: web.Request, ask: Ask, handle: Handle, began_at: float
    ) -> web.StreamResponse:
        def begun() -> None:
            self._meter.first_byte.observe(perf_counter() - began_at)

        if not ask.is_stream:
            response = await answer.whole(request, ask, handle, self._desk.refused)
            begun()
            return response
        stream = Stream(
            request,
            ask,
            handle,
            write_s=self._settings.write_s,
            keepalive_s=self._settings.keepalive_s,
        )
        written = await stream.run(self._desk.refused, begun)
        if stream.broken_by:
            self._meter.broken.labels(stream.broken_by).inc()
        return written

    @contextmanager
    def _counted(self) -> Iterator[None]:
        limit = self._settings.open_max
        if self._open >= limit:
            raise Refusal(
                503,
                "door_full",
                f"{self._open} requests are open, the limit is {limit}",
                retry_after_s=refusal.RETRY_S,
            )
        self._open += 1
        self._meter.open.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            self._meter.open.set(self._open)

    async def _read(self, request: web.Request) -> bytes:
        limit_s = self._settings.read_s
        try:
            async with asyncio.timeout(limit_s):
                return await request.read()
        except web.RequestPayloadError as error:
            # An encoding that it does not have, chunks that are none.
            reason = " ".join(str(error).split())
            raise Refusal(400, "invalid", f"the body cannot be read: {reason}") from None
        except TimeoutError:
            raise Refusal(408, "slow_request", f"no whole body within {limit_s:g} s") from None

    async def _models(self, _: web.Request) -> web.Response:
        cards = [_card(model) for model in self._roster.models()]
        return _json(msgspec.json.encode({"object": "list", "data": cards}))

    async def _model(self, request: web.Request) -> web.Response:
        wanted = request.match_info["model"]
        for model in self._roster.models():
            if model.id == wanted:
                return _json(msgspec.json.encode(_card(model)))
        raise refusal.unknown_model(wanted, [model.id for model in self._roster.models()])

    async def _health(self, _: web.Request) -> web.Response:
        """As a vLLM has it: whether what is asked now would be answered, and not only taken in."""
        why = self._unready() or self._roster.idle
        return web.Response(status=503 if why else 200, text=f"{why or 'ok'}\n")

    async def _version(self, _: web.Request) -> web.Response:
        return _json(msgspec.json.encode({"version": importlib.metadata.version("headgate")}))


def _card(model: Model) -> dict[str, object]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.since,
        "owned_by": "headgate",
        "root": model.id,
        "parent": None,
        "max_model_len": model.max_model_len or None,
    }


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _tls(settings: DoorSettings) -> ssl.SSLContext | None:
    if not settings.tls_cert_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    except OSError as error:
        raise SettingsError(
            f"door.tls_cert_file is {settings.tls_cert_file!r} with key {settings.tls_key_file!r}, "
            f"wanted a certificate and its key: {error}"
        ) from None
    return context
