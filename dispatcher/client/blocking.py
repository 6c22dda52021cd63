"""The client for code without an event loop: the same one, on a loop in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from dispatcher.client.client import Client
from dispatcher.client.completion import Completion
from dispatcher.client.handle import Handle
from dispatcher.client.prompt import Body
from dispatcher.client.standing import Standing
from dispatcher.client.wishes import Wishes
from scheduler.errors import StreamError
from scheduler.wire.client import Request
from scheduler.wire.worker import Result

T = TypeVar("T")


class BlockingClient:
    """`Client`, method for method, each returning when it is done.

    1. `with BlockingClient(Client(...))` starts the thread and connects.
    2. Any thread may call; calls run on the one loop.
    3. Leaving closes the client and ends the thread; who still waits gets a `StreamError`.
    4. A process that was forked has no such thread: each wants a client of its own.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._handing_over = threading.Lock()
        "Held while work is given to the loop, so that none is given to one that ends."

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, name: str | None = None) -> Self:
        """As `Client.from_env`."""
        return cls(Client.from_env(environ, name=name))

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"headgate-{self.name}", daemon=True
        )
        self._thread.start()
        try:
            self.run(self._client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.run(self._client.__aexit__(kind, error, trace))
        finally:
            self._end()

    @property
    def name(self) -> str:
        """The client's name."""
        return self._client.name

    def request(self, body: Body, **wishes: Unpack[Wishes]) -> Request:
        """As `Client.request`."""
        return self._client.request(body, **wishes)

    def submit(self, body: Body, **wishes: Unpack[Wishes]) -> "BlockingHandle":
        """As `Client.submit`."""
        return BlockingHandle(self, self.run(self._client.submit(body, **wishes)))

    def submit_many(self, requests: Iterable[Request | Body]) -> list["BlockingHandle"]:
        """As `Client.submit_many`."""
        return [BlockingHandle(self, h) for h in self.run(self._client.submit_many(requests))]

    def results(self, handles: Iterable["BlockingHandle"]) -> Iterator["BlockingHandle"]:
        """As `Client.results`."""
        by_handle = {id(h.inner): h for h in handles}
        ended = self._client.results([h.inner for h in by_handle.values()])
        return (by_handle[id(one)] for one in self.each(ended))

    def attach(self, request_id: str) -> "BlockingHandle":
        """As `Client.attach`."""
        return BlockingHandle(self, self.run(self._client.attach(request_id)))

    def cancel(self, request_id: str, *, reason: str = "") -> bool:
        """As `Client.cancel`."""
        return self.run(self._client.cancel(request_id, reason=reason))

    def status(self, request_id: str) -> Standing:
        """As `Client.status`."""
        return self.run(self._client.status(request_id))

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """What this coroutine gives, run on the client's loop.

        Raises:
            TimeoutError: it took longer than `timeout_s`; it is cancelled.
            StreamError: the client is not connected.
        """
        with self._handing_over:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                work.close()
                raise StreamError(
                    "the client is not connected in this process, wanted `with BlockingClient(...)`"
                )
            under_way = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return under_way.result(timeout_s)
        except BaseException:
            under_way.cancel()
            raise

    def each(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items one by one, each fetched when it is asked for."""
        done = object()

        async def following() -> T | object:
            return await anext(items, done)

        try:
            while (item := self.run(following())) is not done:
                yield item  # type: ignore[misc]  # not the mark, so a T
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                self.run(close())

    def _end(self) -> None:
        with self._handing_over:
            loop, thread, self._loop = self._loop, self._thread, None
        assert loop is not None
        assert thread is not None
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    """End whatever was begun while the client closed; how it ends is its caller's to hear."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class BlockingHandle:
    """`Handle`, for code without a loop."""

    def __init__(self, client: BlockingClient, inner: Handle) -> None:
        self._client = client
        self.inner = inner
        self.id = inner.id

    def __iter__(self) -> Iterator[str]:
        """Its text as it comes; raises at the end if it did not complete."""
        return self._client.each(aiter(self.inner))

    @property
    def is_done(self) -> bool:
        """Whether its terminal record is here."""
        return self.inner.is_done

    def result(self, timeout_s: float | None = None) -> Completion:
        """Its answer; raises the `OutcomeError` that says how else it ended, or `TimeoutError`."""

        async def ended() -> Completion:
            return await self.inner

        return self._client.run(ended(), timeout_s)

    def record(self, timeout_s: float | None = None) -> Result:
        """Its terminal record, whatever the outcome."""
        return self._client.run(self.inner.record(), timeout_s)

    def cancel(self, reason: str = "") -> bool:
        """As `Handle.cancel`."""
        return self._client.run(self.inner.cancel(reason))

    def status(self) -> Standing:
        """As `Handle.status`."""
        return self._client.run(self.inner.status())
