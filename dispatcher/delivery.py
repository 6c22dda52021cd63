"""Calls repeated until Redis answers them: no decision is lost because Redis is away.

an answer            it is done, or refused, and the caller learns which
no answer            Redis is away: everything is said again, ever more patiently; each call knows its repetition
a passing complaint  loading, read-only after a failover, out of memory, no right: that call is said again
any other complaint  the caller's to judge; only this call fails
fenced               a newer leader exists: whoever learns of it stands down
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from dispatcher.streams import dispatch
from dispatcher.streams.connection import Begun, Call, Connection
from scheduler.errors import FencedError, StreamError

BATCH_MAX = 512
"Calls in one round trip: about 5 ms of the server's time, so that others are served between."

BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)
"Between tries; the last one for as long as it takes. A restarted Redis is back within 0.1 s to a few seconds."

PASSING = (
    "LOADING",
    "READONLY",
    "OOM",
    "MISCONF",
    "NOREPLICAS",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "BUSY",
    "NOAUTH",
    "NOPERM",
    "user executing the script",
    "ACL failure in script",
    "Function not found",
)
"Complaints that end by themselves or by an operator's hand; nothing about the call is wrong."

log = structlog.get_logger()


class Delivery:
    """Says the calls of one reign."""

    def __init__(
        self, connection: Connection, *, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """`on_wait` is called whenever Redis must be waited for: who waits is not stuck."""
        self._connection = connection
        self._on_wait = on_wait
        self.round_trips = 0
        "How often Redis was asked."

    def begin(self, calls: Sequence[Call]) -> Begun | None:
        """Say these now, to be given to `send` with them; None: nothing was said yet."""
        return self._connection.begin(calls) if len(calls) <= BATCH_MAX else None

    async def send(self, calls: Sequence[Call], begun: Begun | None = None) -> list[object]:
        """Every call's reply, in order; a `StreamError` where the server complained about that call itself.

        Raises:
            FencedError: a newer leader exists. Calls after the first refused one were refused as well.
        """
        replies: list[object] = []
        for at in range(0, len(calls), BATCH_MAX):
            replies += await self._send(calls[at : at + BATCH_MAX], begun)
        return replies

    async def _send(self, calls: Sequence[Call], begun: Begun | None) -> list[object]:
        replies = await self._ask(calls, begun)
        tries = 0
        while unsaid := [at for at, reply in enumerate(replies) if _is_passing(reply)]:
            self._on_wait()
            tries = await wait_out(str(replies[unsaid[0]]), tries)
            answers = await self._ask([calls[at] for at in unsaid])
            for at, answer in zip(unsaid, answers, strict=True):
                replies[at] = answer
        return replies

    async def _ask(self, calls: Sequence[Call], begun: Begun | None = None) -> list[object]:
        self.round_trips += 1
        try:
            replies = await self._connection.batch(calls, begun)
        except StreamError as error:
            return [_Away(str(error))] * len(calls)
        if dispatch.FENCED in replies:
            raise FencedError("a newer leader exists")
        return list(replies)


async def wait_out(reason: str, tries: int) -> int:
    """Pause before the next of so many tries; their new number.

    Said aloud ever more rarely: an hour's outage is a dozen lines.
    """
    if tries & (tries - 1) == 0:
        log.warning("redis_waits", tries=tries, reason=reason)
    await asyncio.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
    return tries + 1


class _Away(StreamError):
    """No answer at all."""


def _is_passing(answer: object) -> bool:
    if not isinstance(answer, StreamError):
        return False
    return isinstance(answer, _Away) or any(word in str(answer) for word in PASSING)
