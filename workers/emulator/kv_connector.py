"""Half a request here and half on another engine: the emulated KV connector, with the words of vLLM's NIXL.

On the engine that computes a prompt (`do_remote_decode`):
    1. `park`      its blocks stay held, under a lease; `kv_transfer_params` say where they are
    2. `hand_out`  another engine keeps a connection open for as long as it wants them, and no lease ends meanwhile
    3. that connection closes, or the lease has run out: they are free

On the one that decodes (`do_remote_prefill`):
    1. `fetch`     asks the other, as soon as the request is here
    2. its own engine has room for it: the bytes flow, one prompt at a time
    3. they are there, and the last token is computed; or they are not to be had, and `kv_load_failure_policy` holds

What the real one does where the lease has run out, or where the parameters belong to another prompt, it does as well:
it answers, from whatever lies in those blocks now. So a test sees by the text that KV was relied on for too long.
"""

import asyncio
import uuid
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from aiohttp import web

from scheduler.sim.engine import Engine
from scheduler.sim.sequence import Sequence
from workers.emulator.settings import KvTransfer

if TYPE_CHECKING:
    from workers.emulator.answer import Answer

PATH = "/emulator/kv/{engine}/{request}"

HANDSHAKE_S = 0.005
"Engine seconds before a transfer's first byte; of a warm connection."

WAIT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
"A connection stays for as long as the KV is wanted."


class _Offer(msgspec.Struct, frozen=True):
    """What the engine that has the KV says of it."""

    prompt: str
    "The prompt's digest."
    link_gbps: float


class _Parked(msgspec.Struct, frozen=True):
    """Blocks that wait to be fetched."""

    prompt: str
    lease: asyncio.TimerHandle


class _LostError(Exception):
    """The KV is not to be had."""


class KvConnector:
    """One engine's."""

    def __init__(
        self,
        settings: KvTransfer,
        engine: Engine,
        *,
        kv_token_bytes: int,
        time_scale: float,
        kick: Callable[[], None],
        lost: Callable[["Answer"], None],
    ) -> None:
        """Nothing is parked.

        Args:
            settings: as the server was started.
            engine: whose blocks they are.
            kv_token_bytes: one token's KV.
            time_scale: how much faster than the wall clock the link is; the lease is not.
            kick: an idle engine may have work again.
            lost: an answer's KV is not to be had.
        """
        self._settings, self._engine = settings, engine
        self._kv_token_bytes, self._time_scale = kv_token_bytes, time_scale
        self._kick, self._lost = kick, lost
        self._loop = asyncio.get_running_loop()
        self.engine_id = str(uuid.uuid4())
        self.address = ("", 0)
        "Where others find it; known once the server has bound its port."
        self.expired = 0
        "Leases that ran out."
        self.failed = 0
        "Transfers that did."
        self._parked: dict[str, _Parked] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._granted: dict[str, asyncio.Event] = {}
        self._closing = asyncio.Event()
        self._link_free_at = 0.0

    def close(self) -> None:
        """The engine is gone, and all KV with it."""
        self._closing.set()
        for parked in self._parked.values():
            parked.lease.cancel()
        self._parked.clear()
        for task in self._fetches.values():
            task.cancel()

    # The engine that computes prompts.

    def park(self, answer: "Answer", sequence: Sequence) -> bytes:
        """Keep an ended sequence's blocks; its `kv_transfer_params`."""
        lease_s = self._settings.kv_connector_extra_config.kv_lease_duration
        lease = self._loop.call_later(lease_s, self._expire, sequence.id)
        self._parked[sequence.id] = _Parked(digest(answer), lease)
        host, port = self.address
        n_blocks = -(-sequence.prompt_tokens // self._engine.settings.block_size)
        return msgspec.json.encode(
            {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [list(range(1, n_blocks + 1))],
                "remote_engine_id": self.engine_id,
                "remote_request_id": sequence.id,
                "remote_host": host,
                "remote_port": port,
                "tp_size": 1,
                "dcp_size": 1,
                "pp_size": 1,
                "remote_num_tokens": sequence.prompt_tokens,
                "remote_blocks_expiry_time": None,
                "transfer_mode": "pull",
            }
        )

    async def hand_out(self, request: web.Request) -> web.StreamResponse:
        """Hold what was parked for as long as somebody keeps the connection; 404: another life's, 410: forgotten."""
        if request.match_info["engine"] != self.engine_id or self._closing.is_set():
            return web.Response(status=404)
        name = request.match_info["request"]
        parked = self._parked.get(name)
        if parked is None:
            return web.Response(status=410)
        parked.lease.cancel()
        response = web.StreamResponse()
        try:
            await response.prepare(request)
            offer = _Offer(prompt=parked.prompt, link_gbps=self._settings.link_gbps)
            await response.write(msgspec.json.encode(offer) + b"\n")
            await self._closing.wait()
        finally:
            self._release(name)
        return response

    def _expire(self, name: str) -> None:
        self.expired += 1
        self._release(name)

    def _release(self, name: str) -> None:
        if self._parked.pop(name, None) is not None:
            self._engine.forget(name)
            self._kick()

    # The engine that decodes.

    def fetch(self, answer: "Answer", sequence: Sequence) -> None:
        """Begin to fetch a prompt's KV; the sequence waits for it in the engine."""
        self._granted[sequence.id] = asyncio.Event()
        self._fetches[sequence.id] = asyncio.create_task(self._fetch(answer, sequence))

    def drop(self, sequence: Sequence) -> None:
        """Nobody waits for this one's KV any more."""
        task = self._fetches.pop(sequence.id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def grant(self) -> None:
        """The engine may have made room for some."""
        for sequence in self._engine.take_loading():
            self._granted[sequence.id].set()

    async def _fetch(self, answer: "Answer", sequence: Sequence) -> None:
        try:
            is_right = await self._transfer(answer, sequence)
        except (_LostError, aiohttp.ClientError, OSError):
            self.failed += 1
            self._lost(answer)
        else:
            if not is_right:
                answer.garble()
            self._engine.loaded(sequence.id)
            self._kick()
        finally:
            del self._granted[sequence.id]
            self._fetches.pop(sequence.id, None)

    async def _transfer(self, answer: "Answer", sequence: Sequence) -> bool:
        """Whether what has come is the prompt's own.

        Raises:
            _LostError: the other engine is another by now, or is gone in the middle.
        """
        said = answer.ask.transfer
        root = f"http://{said.remote_host}:{said.remote_port}"
        path = PATH.format(engine=said.remote_engine_id, request=said.remote_request_id)
        async with (
            aiohttp.ClientSession(timeout=WAIT) as session,
            session.get(root + path) as response,
        ):
            if response.status not in (200, 410):
                raise _LostError
            await self._granted[sequence.id].wait()
            if response.status == 410:
                await asyncio.sleep(self._flow_s(sequence, self._settings.link_gbps))
                return False
            offer = msgspec.json.decode(await response.content.readline(), type=_Offer)
            gone = asyncio.ensure_future(response.content.read())
            await asyncio.wait([gone], timeout=self._flow_s(sequence, offer.link_gbps))
            if gone.done():
                raise _LostError
            gone.cancel()
            return offer.prompt == digest(answer)

    def _flow_s(self, sequence: Sequence, other_gbps: float) -> float:
        """Wall seconds until it is through, behind those that are under way."""
        n_bytes = (sequence.prompt_tokens - sequence.cached_tokens) * self._kv_token_bytes
        link = min(self._settings.link_gbps, other_gbps) * 1e9 / 8 * self._time_scale
        now = self._loop.time()
        begins_at = max(now + HANDSHAKE_S / self._time_scale, self._link_free_at)
        self._link_free_at = begins_at + n_bytes / link
        return self._link_free_at - now


def digest(answer: "Answer") -> str:
    """A prompt, as its KV would tell it from others."""
    return blake2b(answer.ask.context.data([]), digest_size=16).hexdigest()
