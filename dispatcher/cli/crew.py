"""Parallel processes that are all begun alike, and a bar that says how far they are."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from threading import Thread
from types import FrameType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class Crew:
    """So many processes, or as many as there are cores; one alone is this process itself."""

    def __init__(self, jobs: int | None, begin: Callable[..., None], *given: object) -> None:
        """Each process calls `begin` with what is given before its first task."""
        n_jobs = jobs or os.cpu_count() or 1
        self._begin = begin, given
        child = functools.partial(_begin, begin, *given)
        self._pool = ProcessPoolExecutor(n_jobs, initializer=child) if n_jobs > 1 else None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, _leave)
        if self._pool is None:
            begin, given = self._begin
            begin(*given)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, self._before)

    def each(
        self, what: str, function: Callable[..., T], calls: Sequence[tuple[object, ...]]
    ) -> Iterator[tuple[int, T]]:
        """Each call's place and result, as they come."""
        # All children are forked here, before the bar starts a thread of its own.
        futures = self._submitted(function, calls)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=len(calls))
            if futures is None:
                for at, call in enumerate(calls):
                    yield at, function(*call)
                    bar.advance(task)
                return
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.advance(task)

    def all(
        self, what: str, function: Callable[..., T], calls: Sequence[tuple[object, ...]]
    ) -> list[T]:
        """The results in the order of the calls."""
        found = dict(self.each(what, function, calls))
        return [found[at] for at in range(len(calls))]

    def _submitted(
        self, function: Callable[..., T], calls: Sequence[tuple[object, ...]]
    ) -> dict[Future[T], int] | None:
        if self._pool is None:
            return None
        return {self._pool.submit(function, *call): at for at, call in enumerate(calls)}


def _begin(begin: Callable[..., None], *given: object) -> None:
    """In a child: it ends with its parent, whatever that one dies of."""
    Thread(target=_end_with_parent, daemon=True).start()
    begin(*given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only children run this"
    wait([parent.sentinel])
    os._exit(1)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """End by the signal, with the cursor that the bar hid; an exception could be lost where a process is forked."""
    Console(stderr=True).show_cursor()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
