"""Who leads a pool: a lease in Redis with an epoch that only grows.

The lease decides who should act; the epoch, compared inside every move, decides who can. So a leader that was
frozen past its lease does no harm, and the clocks of two machines never meet: Redis' own counts the lease.
"""

import asyncio

import structlog

from dispatcher.delivery import wait_out
from dispatcher.streams import dispatch
from dispatcher.streams.connection import Connection
from scheduler.errors import FencedError, StreamError
from scheduler.keys import Keys

RENEWALS = 3
"Renewals in one lease: two may fail before anybody else leads."

POLL_MIN_S = 0.02
"A standby waits at least so long before it asks again."

log = structlog.get_logger()


class Lease:
    """One node's claim to lead one pool."""

    def __init__(self, connection: Connection, keys: Keys, *, node: str, ttl_s: float) -> None:
        """Claim nothing yet."""
        self._connection = connection
        self._keys = keys
        self._node = node
        self._ttl_s = ttl_s
        self._life = ""
        "Of Redis, when the reign began."
        self.asked_at = float("-inf")
        "When Redis last answered us, on its clock: a standby is warm while this is fresh."

    async def win(self) -> int:
        """Wait for the lease; the epoch of the reign that begins. Redis may be away meanwhile."""
        tries = 0
        while True:
            try:
                self._life = await self._connection.life()
                epoch, _, until = await self._lead(0)
            except StreamError as error:
                tries = await wait_out(str(error), tries)
                continue
            if epoch:
                return epoch
            tries = 0
            left_s = until - self._connection.now()
            await asyncio.sleep(max(POLL_MIN_S, min(self._ttl_s / RENEWALS, left_s)))

    async def keep(self, epoch: int) -> None:
        """Renew until a newer leader is there, or Redis has lost this reign.

        Raises:
            FencedError: the reign is over.
        """
        while True:
            await asyncio.sleep(self._ttl_s / RENEWALS)
            try:
                held, holder, _ = await self._lead(epoch)
                life = await self._connection.life()
            except StreamError as error:
                log.warning("lease_not_renewed", epoch=epoch, reason=str(error))
                continue
            if held == epoch and life == self._life:
                continue
            if held == epoch:
                raise FencedError(f"epoch {epoch} is over, redis has begun anew")
            if (
                held
            ):  # the lease was lost with the server's memory, and is ours anew: begin anew as well
                await self.resign(held)
            raise FencedError(f"epoch {epoch} is over, {holder} leads")

    async def resign(self, epoch: int = 0) -> None:
        """End the lease now; a failure only costs the next leader the rest of it."""
        try:
            call = dispatch.resign(self._keys, epoch, self._node)
            await self._connection.call(call.function, call.keys, call.args)
        except StreamError as error:
            log.warning("not_resigned", epoch=epoch, reason=str(error))

    async def _lead(self, epoch: int) -> tuple[int, str, float]:
        call = dispatch.lead(self._keys, self._node, ttl_s=self._ttl_s, epoch=epoch)
        held, holder, until = await self._connection.call(call.function, call.keys, call.args)
        self.asked_at = self._connection.now()
        name = holder.decode() if isinstance(holder, bytes) else str(holder)
        return int(held), name, int(until) / 1e3
