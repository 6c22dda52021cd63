"""Handing requests in, and taking them back when nobody waits for them any more."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from time import perf_counter

import structlog

from dispatcher.client.client import Client
from dispatcher.client.handle import Handle
from dispatcher.client.wishes import Wishes
from dispatcher.door import refusal
from dispatcher.door.ask import Ask
from dispatcher.door.meter import Meter
from dispatcher.door.refusal import Refusal
from dispatcher.door.roster import Roster
from scheduler.errors import RequestRejected, StreamError, UnknownRequestError, WireError
from scheduler.wire.words import ID_PATTERN
from scheduler.wire.worker import Result

TRIES_MAX = 8
"How often one name may be tried again after it ended without an answer, while the record of that is kept."

CANCEL_TRIES = 10
CANCEL_RETRY_S = 0.5
"A cancellation that Redis did not take is said again; past that only the deadline ends the request."

OVER = "the client disconnected"

log = structlog.get_logger()


class Desk:
    """Every request of this door, under its id.

    1. `handed_in` enqueues it, or joins the one of the same name that lives or was answered.
    2. Inside the block somebody waits for it. When the last one leaves before its end, it is cancelled.
    3. `close` waits until the last cancellation has been said.
    """

    def __init__(self, client: Client, roster: Roster, meter: Meter) -> None:
        self._client, self._roster, self._meter = client, roster, meter
        self._waiting: Counter[str] = Counter()
        self._farewells: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def handed_in(self, ask: Ask, raw: bytes, *, tenant: str | None) -> AsyncIterator[Handle]:
        """The request, enqueued; `tenant` is whose key was shown.

        Raises:
            Refusal: it is not wanted, cannot be served, or Redis is away.
        """
        await self._check_model(ask.model)
        names = _names(ask.name, tenant)
        # Counted before it is sent: who leaves while another joins takes nothing along.
        with self._counted(ask.name and names[0]) as others:
            sending = asyncio.create_task(self._enqueue(ask, raw, tenant, names))
            try:
                # Shielded: once on its way to Redis it is there, and must be found to be cancelled.
                yield await asyncio.shield(sending)
            finally:
                if not others():
                    self._say_farewell(sending, outlives=ask.outlives)

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[Callable[[], int]]:
        """Somebody waits for the request of this name; gives how many others do. A nameless one is one's own."""
        self._waiting[name] += 1
        try:
            yield lambda: self._waiting[name] - 1 if name else 0
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]

    async def refused(self, record: Result, model: str) -> Refusal:
        """Why a request got no answer."""
        return refusal.of_record(record, is_served=await self._roster.is_served(model))

    async def close(self) -> None:
        """Wait for the cancellations that are on their way."""
        await asyncio.gather(*self._farewells)

    async def _check_model(self, model: str) -> None:
        if await self._roster.is_served(model):
            return
        if self._roster.trouble:
            raise refusal.redis_away(StreamError(self._roster.trouble))
        if self._roster.is_known(model) or not self._roster.has_any():
            raise refusal.no_endpoint(f"no endpoint that serves {model!r} is ready")
        raise refusal.unknown_model(model, [one.id for one in self._roster.models()])

    async def _enqueue(self, ask: Ask, raw: bytes, tenant: str | None, names: list[str]) -> Handle:
        wishes = ask.wishes | ({"tenant": tenant} if tenant else {})
        began_at = perf_counter()
        try:
            handle = await self._first(raw, wishes, names)
        except RequestRejected as error:
            raise refusal.queue_full(error) from None
        except StreamError as error:
            raise refusal.redis_away(error) from None
        except (WireError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, "invalid", str(error)) from None
        self._meter.hand_in.observe(perf_counter() - began_at)
        return handle

    async def _first(self, raw: bytes, wishes: Wishes, names: list[str]) -> Handle:
        """The request under the first of these names that is free, lives, or was answered."""
        for name in names:
            named: Wishes = {"id": name} if name else {}
            with contextlib.suppress(UnknownRequestError):  # it ended; its record is gone
                handle = await self._client.submit(raw, **(wishes | named))
                if not _is_spent(handle):
                    return handle
        raise Refusal(
            409, "name_spent", f"{names[0]!r} was tried {len(names)} times, wanted a new one"
        )

    def _say_farewell(self, sending: asyncio.Task[Handle], *, outlives: bool) -> None:
        """Nobody waits for it any more: unless it has ended, it is cancelled."""
        if sending.done() and (sending.exception() is not None or sending.result().is_done):
            return
        self._meter.gone.inc()
        if not outlives:
            farewell = asyncio.create_task(self._cancel(sending))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    async def _cancel(self, sending: asyncio.Task[Handle]) -> None:
        try:
            handle = await sending
        except Refusal:
            return  # it never was
        for _ in range(CANCEL_TRIES):
            try:
                if await handle.cancel(OVER):
                    self._meter.cancelled.inc()
            except UnknownRequestError:
                return
            except StreamError as error:
                log.warning("cancel_failed", request_id=handle.id, reason=str(error))
                await asyncio.sleep(CANCEL_RETRY_S)
            else:
                return


def _names(name: str, tenant: str | None) -> list[str]:
    """The ids under which a request of this name may run: itself, then its repetitions.

    A key's holder has names of its own, so that nobody reads another tenant's answer by guessing its id.
    """
    if not name:
        return [""]
    root = f"{tenant}:{name}" if tenant else name
    if not ID_PATTERN.fullmatch(f"{root}.{TRIES_MAX}"):
        raise Refusal(
            400, "invalid", f"x-request-id has {len(name)} characters, too many", param="id"
        )
    return [root, *(f"{root}.{number}" for number in range(2, TRIES_MAX + 1))]


def _is_spent(handle: Handle) -> bool:
    """It ended without an answer before we came: a repetition wants another try, not the old refusal.

    One that we sent may have ended by now as well, and that is its answer.
    """
    known = handle.known
    return handle.is_found and known is not None and known.outcome != "completed"
