"""A terminal record that is to come, and all who wait for it."""

import asyncio
from collections.abc import Callable

from scheduler.errors import StreamError
from scheduler.wire.worker import Result


class Awaited:
    """One request's record: not here, or here for good, or never to come.

    Whoever waits has his turn as soon as it is here, and is cancelled for himself alone: a future would be cancelled for
    all, and `asyncio.shield` before it lets two others have their turns first.
    """

    def __init__(self, record: Result | None = None) -> None:
        """With its record, or without."""
        self.record = record
        "None: it is not here."
        self.is_sent = False
        "Redis has taken the request: where it knows it no more, it has lost it."
        self._error: StreamError | None = None
        self._loop = None if record is not None else asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing is waited for any more."""
        return self.record is not None or self._error is not None

    def bring(self, record: Result) -> None:
        """It is here."""
        self.record = record
        self._wake()

    def give_up(self, error: StreamError) -> None:
        """It will not come, and this is why."""
        self._error = error
        self._wake()

    def tell(self, callback: Callable[[], object]) -> None:
        """Call this in a turn of its own once it is over."""
        if self.is_over:
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._callbacks.append(callback)

    async def wait(self) -> Result:
        """The record.

        Raises:
            StreamError: it will not come, or not to this event loop.
        """
        if not self.is_over:
            loop = asyncio.get_running_loop()
            if loop is not self._loop:
                raise StreamError("a handle is awaited on another event loop than its client's")
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        if self._error is not None:
            raise self._error
        assert self.record is not None, "who waits was woken for nothing"
        return self.record

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():  # else whoever waited was cancelled meanwhile
                waiter.set_result(None)
        for callback in self._callbacks:
            asyncio.get_running_loop().call_soon(callback)
        self._callbacks.clear()
