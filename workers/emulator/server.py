"""The emulated server's routes for clients, and its life as a process.

How vLLM 0.32 behaves where it is surprising, and this therefore too: a stream that admission
refuses after it was let in is a 200 with an error chunk; `/health` is 200 while paused, asleep and draining;
a draining server answers new requests with 200 and no tokens.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
from aiohttp import web

from scheduler.errors import SettingsError
from scheduler.sim.refusal import QueueFullError
from workers.emulator import faults, kv_connector
from workers.emulator.answer import DONE, ENGINE_DEAD, Answer, framed_event
from workers.emulator.controls import Controls, json_reply
from workers.emulator.protocol import Kind, RefusedError, tokens, understand
from workers.emulator.service import Service
from workers.emulator.settings import EmulatorSettings

VERSION = "0.32.0"
"The vLLM whose behaviour this follows."

MAX_BODY_BYTES = 64 * 2**20
"Room for the longest prompt of any profile as a list of ids."

LINGER_S = 0.2
"Wall seconds between the last answer and a closed port; the real one takes 2 to 7."

CRASH_CLOSES_AFTER_S = 0.2
"Wall seconds between an engine's death and a closed port: under 0.3 in the real one."

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Emulator:
    """A running emulated server.

    1. `start`, or entering the context, binds the port; `url` is valid from then on.
    2. `terminate` does what SIGTERM does to the real one.
    3. `gone` is set when the server has closed its port, whatever the reason.
    4. `stop`, or leaving the context, ends it at once.
    """

    def __init__(
        self, settings: EmulatorSettings, *, die: Callable[[], None] | None = None
    ) -> None:
        """A server that does not serve yet.

        Args:
            settings: what it emulates.
            die: what the fault `die` does to the process; by default it only cuts every
                connection and closes the port, which is what the rest of the world sees.
        """
        self.settings = settings
        self.url = ""
        self._die = die
        self.gone = asyncio.Event()
        self.exit_code = 0
        "What the process should exit with once `gone`."
        self._n_in_server = 0
        self._watch: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            SettingsError: the port cannot be bound.
        """
        self.service = Service(self.settings)
        self._runner = web.AppRunner(
            self._application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        host = self.settings.host
        site = web.TCPSite(self._runner, host, self.settings.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError(
                f"port {self.settings.port} on {host} cannot be bound: {error.strerror}"
            ) from error
        port = self._runner.addresses[0][1]
        self.url = f"http://{host}:{port}"
        transfer, connector = self.settings.kv_transfer, self.service.kv_connector
        if transfer is not None and connector is not None:
            connector.address = (transfer.host or host, port)
        self._watch = asyncio.create_task(self._watch_for_death())

    async def stop(self) -> None:
        """End at once: connections are cut."""
        for task in (self._watch, self._ending):
            if task is not None:
                task.cancel()
        self._cut_all()
        await self._close()

    def terminate(self) -> None:
        """SIGTERM: drain for the shutdown timeout, then abort what is left, then go."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    # Ends.

    async def _end(self) -> None:
        if self.settings.shutdown_timeout_s > 0:
            await self.service.drain(self.settings.shutdown_timeout_s)
        else:
            self.service.life = "draining"
            self.service.abort_all()
        await asyncio.sleep(LINGER_S)
        await self._close()

    async def _watch_for_death(self) -> None:
        crashed = asyncio.ensure_future(self.service.crashed.wait())
        died = asyncio.ensure_future(self.service.died.wait())
        try:
            await asyncio.wait((crashed, died), return_when=asyncio.FIRST_COMPLETED)
        finally:
            crashed.cancel()
            died.cancel()
        self.exit_code = 1
        if self.service.died.is_set():
            if self._die is not None:
                self._die()
            self._cut_all()
        else:
            await asyncio.sleep(CRASH_CLOSES_AFTER_S)
        await self._close()

    def _cut_all(self) -> None:
        """Break every connection without a word."""
        server = self._runner.server
        for connection in server.connections if server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()

    async def _close(self) -> None:
        if not self.gone.is_set():
            self.service.close()
            await self._runner.cleanup()
            self.gone.set()

    # Routes.

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/load", self._load),
                web.get("/version", self._version),
                web.get("/kv_event_sources", self._kv_event_sources),
            ]
        )
        app.add_routes(Controls(self.service).routes(allow_faults=self.settings.allow_faults))
        if self.service.kv_connector is not None:
            app.add_routes([web.get(kv_connector.PATH, self.service.kv_connector.hand_out)])
        return app

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, "completion")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, "chat")

    async def _generate(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        self._n_in_server += 1
        try:
            return await self._answer(request, kind)
        except RefusedError as error:
            return json_reply(error.body(), status=error.status)
        finally:
            self._n_in_server -= 1

    async def _answer(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        raw = await request.read()
        fault = self.service.faults.take()
        match fault:
            case faults.HttpStatus(status=status):
                raise RefusedError(status, "a fault was asked for", kind="EmulatedFault")
            case faults.Garbage():
                return web.Response(body=b"\x00<html>not what you wanted", content_type="text/html")
            case faults.Silence():
                await asyncio.Event().wait()
                raise AssertionError("nobody sets that event")
        ask = understand(
            raw,
            kind,
            model=self.settings.model,
            max_model_len=self.service.max_model_len,
            priority_header=request.headers.get("X-Vllm-Priority"),
        )
        if isinstance(fault, faults.Endless):
            ask = msgspec.structs.replace(
                ask, max_tokens=fault.tokens, ignore_eos=True, output_tokens=None
            )
            fault = None
        if self.settings.enable_force_include_usage:
            ask = msgspec.structs.replace(ask, has_usage=True)
        if self.service.life == "dead":
            return json_reply(ENGINE_DEAD, status=500)
        answer = self.service.open(ask, _external_id(request, kind), created=int(time.time()))
        if isinstance(fault, faults.NoTokens) or self.service.life == "draining":
            return await self._say_nothing(request, answer)
        self._preflight()
        answer.plan(fault)
        await asyncio.sleep(self.service.frontend_s())
        if ask.is_stream:
            return await self._stream(request, answer)
        return await self._whole(request, answer)

    def _preflight(self) -> None:
        """What can be refused before a stream begins; who comes in between is refused inside it."""
        try:
            self.service.engine.check_admission()
        except QueueFullError as error:
            self.service.metrics.rejected[error.reason] += 1
            raise _refusal(error) from error

    async def _whole(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        try:
            self._submit(answer)
        except QueueFullError as error:
            raise _refusal(error) from error
        try:
            ending = await answer.done
        finally:
            self.service.abort(answer)
        if ending == "error":
            return json_reply(ENGINE_DEAD, status=500)
        if ending == "cut":
            _cut(request)
        return json_reply(answer.body(ending))

    async def _stream(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        response = await self._open_stream(request, answer)
        try:
            self._submit(answer)
            if await answer.done == "cut":
                _cut(request)
        except QueueFullError as error:
            _write_all(request, framed_event(_refusal(error).body()), DONE)
        finally:
            self.service.abort(answer)
        await response.write_eof()
        return response

    async def _say_nothing(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        """200 and no token: what a draining vLLM says to new requests."""
        if not answer.ask.is_stream:
            return json_reply(answer.body("empty"))
        response = await self._open_stream(request, answer)
        answer.end("empty")
        await response.write_eof()
        return response

    async def _open_stream(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        """Send the headers; from then on the answer writes to the transport by itself."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client was gone before its stream began")

        def write(framed: bytes) -> None:
            if not transport.is_closing():
                transport.write(framed)

        answer.write = write
        return response

    def _submit(self, answer: Answer) -> None:
        if answer.ask.kills_engine:
            self.service.crash()
            answer.end("error")
            return
        match self.service.life:
            case "dead":
                answer.end("error")
                return
            case "draining":
                answer.end("empty")
                return
        try:
            self.service.submit(answer)
        except QueueFullError as error:
            self.service.metrics.rejected[error.reason] += 1
            raise

    async def _models(self, _: web.Request) -> web.Response:
        card = {
            "id": self.settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.settings.model,
            "parent": None,
            "max_model_len": self.service.max_model_len,
        }
        return json_reply(msgspec.json.encode({"object": "list", "data": [card]}))

    async def _tokenize(self, request: web.Request) -> web.Response:
        try:
            ids = tokens(await request.read())
        except RefusedError as error:
            return json_reply(error.body(), status=error.status)
        limit = self.service.max_model_len
        found = {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}
        return json_reply(msgspec.json.encode(found))

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self.service.life == "dead" else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self.service.metrics.render(
            self.service.engine,
            model=self.settings.model,
            sleep_level=self.service.sleep_level,
        )
        return web.Response(body=text.encode(), headers={"Content-Type": METRICS_TYPE})

    async def _load(self, _: web.Request) -> web.Response:
        return json_reply(msgspec.json.encode({"server_load": self._n_in_server}))

    async def _version(self, _: web.Request) -> web.Response:
        return json_reply(msgspec.json.encode({"version": VERSION}))

    async def _kv_event_sources(self, _: web.Request) -> web.Response:
        publisher = self.service.kv_events
        return json_reply(msgspec.json.encode({"0": publisher.source} if publisher else {}))


def _refusal(error: QueueFullError) -> RefusedError:
    return RefusedError(503, str(error), kind="Service Unavailable")


def _external_id(request: web.Request, kind: Kind) -> str:
    """The id `abort_requests` wants: completions carry the number of the prompt, chats do not."""
    name = request.headers.get("X-Request-Id") or uuid.uuid4().hex
    return f"cmpl-{name}-0" if kind == "completion" else f"chatcmpl-{name}"


def _cut(request: web.Request) -> None:
    """Break the connection without a word."""
    if request.transport is not None:
        request.transport.abort()


def _write_all(request: web.Request, *parts: bytes) -> None:
    if request.transport is not None:
        request.transport.write(b"".join(parts))
