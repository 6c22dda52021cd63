"""What is done to the emulated server beside asking it: pause, sleep, empty its cache, abort, break it.

vLLM's development endpoints, and one of our own for faults.
"""

import msgspec
from aiohttp import web

from scheduler.errors import UNREADABLE
from workers.emulator import faults
from workers.emulator.protocol import error_body
from workers.emulator.service import PauseMode, Service


class _AbortBody(msgspec.Struct, frozen=True):
    request_ids: list[str]


_fault_decoder = msgspec.json.Decoder(faults.Fault)


class Controls:
    """The routes, over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self, *, allow_faults: bool) -> list[web.RouteDef]:
        """All of them; the one for faults only where it is allowed."""
        return [
            web.post("/pause", self._pause),
            web.post("/resume", self._resume),
            web.get("/is_paused", self._is_paused),
            web.post("/sleep", self._sleep),
            web.post("/wake_up", self._wake_up),
            web.get("/is_sleeping", self._is_sleeping),
            web.post("/reset_prefix_cache", self._reset_prefix_cache),
            web.post("/inference/v1/abort_requests", self._abort_requests),
            *([web.post("/emulator/fault", self._fault)] if allow_faults else []),
        ]

    async def _pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        try:
            wanted = msgspec.convert(mode, PauseMode)
        except msgspec.ValidationError:
            message = f"mode is {mode!r}, one of abort, wait, keep wanted"
            return json_reply(error_body(400, message, kind="BadRequestError"), status=400)
        await self._service.pause(wanted)
        return json_reply(b'{"status":"paused"}')

    async def _resume(self, _: web.Request) -> web.Response:
        self._service.resume()
        return json_reply(b'{"status":"resumed"}')

    async def _sleep(self, request: web.Request) -> web.Response:
        said = request.query.get("level", "1")
        if said not in ("0", "1", "2"):
            message = f"level is {said!r}, one of 0, 1, 2 wanted"
            return json_reply(error_body(400, message, kind="BadRequestError"), status=400)
        level = int(said)
        self._service.sleep(level)
        return json_reply(msgspec.json.encode({"status": "sleeping", "level": level}))

    async def _wake_up(self, _: web.Request) -> web.Response:
        self._service.wake_up()
        return json_reply(b'{"status":"awake","tags":null}')

    async def _is_paused(self, _: web.Request) -> web.Response:
        return json_reply(msgspec.json.encode({"is_paused": self._service.is_paused}))

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return json_reply(
            msgspec.json.encode({"is_sleeping": self._service.sleep_level is not None})
        )

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        return json_reply(msgspec.json.encode({"success": self._service.reset_prefix_cache()}))

    async def _abort_requests(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=_AbortBody)
        except UNREADABLE as error:
            return json_reply(error_body(400, str(error), kind="BadRequestError"), status=400)
        self._service.abort_ids(body.request_ids)
        return json_reply(b"{}")

    async def _fault(self, request: web.Request) -> web.Response:
        try:
            fault = _fault_decoder.decode(await request.read())
        except UNREADABLE as error:
            return json_reply(error_body(400, str(error), kind="BadRequestError"), status=400)
        if isinstance(fault, faults.EngineFault):
            self._service.strike(fault)
        else:
            self._service.faults.put(fault)
        return json_reply(b"{}")


def json_reply(body: bytes, *, status: int = 200) -> web.Response:
    """JSON that is encoded already."""
    return web.Response(body=body, status=status, content_type="application/json")
