"""Recordings as files: read back line by line, and copied from a pool's streams."""

import contextlib
import gzip
import heapq
import zlib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from dispatcher.cli.download import FileError
from dispatcher.intake import Intake, Unreadable, stamped_at
from dispatcher.streams.connection import Connection, Entry
from dispatcher.streams.pages import pages
from scheduler import codec, recording
from scheduler.core import CoreSettings
from scheduler.errors import WireError
from scheduler.keys import Keys
from scheduler.recording import LINE_BYTES_MAX, Head, Line, RecordingError
from scheduler.wire.dispatcher import Decision

GZIP = b"\x1f\x8b"


class Recording:
    """A file being read. `is_cut` is known once its lines have been read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the head.

        Raises:
            RecordingError: it is no recording of ours.
        """
        self.name = str(path)
        self.is_cut = False
        "Whether it ends within a line: its writer was killed, still writes, or the copy is not whole."
        self.head: Head
        self.lines: Iterator[Line]
        self.head, self.lines = recording.read(self._numbered(file), name=self.name)

    def _numbered(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(LINE_BYTES_MAX + 1)
            except EOFError:
                self.is_cut = True
                return
            except (gzip.BadGzipFile, zlib.error) as error:
                raise RecordingError(
                    self.name, number, f"the gzip data is broken: {error}"
                ) from None
            if len(line) > LINE_BYTES_MAX:
                raise RecordingError(self.name, number, f"longer than {LINE_BYTES_MAX} bytes")
            if not line.endswith(b"\n"):
                self.is_cut = bool(line)
                if number == 1 and line:
                    yield number, line  # what is no recording at all should be told so
                return
            yield number, line.rstrip()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Recording]:
    """A recording, plain or gzip.

    Raises:
        FileError: it cannot be read.
        RecordingError: it is none.
    """
    try:
        with path.open("rb") as raw:
            is_packed = raw.read(2) == GZIP
            raw.seek(0)
            yield Recording(path, gzip.GzipFile(fileobj=raw) if is_packed else raw)  # type: ignore[arg-type]
    except OSError as error:
        raise FileError(f"cannot read {str(path)!r}: {error.strerror}") from None


def whole(found: Recording) -> Iterator[Line]:
    """Its lines and those of the parts that its reign went on in, as far as they lie beside it."""
    for line in found.lines:
        path = Path(found.name)
        later = path.with_name(f"{path.stem[:-4]}{found.head.part + 1:04}{path.suffix}")
        if line.end != "rolled" or not later.exists():
            yield line
            continue
        with opened(later) as part:
            yield from whole(part)
            found.is_cut = part.is_cut


async def copied(
    connection: Connection, keys: Keys, settings: CoreSettings, *, since: float
) -> AsyncIterator[bytes]:
    """The lines of a recording made from what the pool's streams still hold since a moment, oldest first.

    Raises:
        StreamError: Redis is away.
    """
    yield recording.encode(
        recording.head(settings, seed=None, version=metadata.version("headgate"), pool=keys.pool)
    )
    reader = Intake(keys, body_bytes=LINE_BYTES_MAX)
    first = f"{round(since * 1e3)}-0"
    streams = (keys.beats, keys.requests, keys.controls, keys.decisions, keys.rewards)
    # Who was drained before is drained still.
    read = [
        _entries(connection, stream, "0-0" if stream == keys.controls else first)
        for stream in streams
    ]
    async for stream, entry in _merged(streams, read):
        line = _line(reader, keys, stream, entry)
        if line is not None:
            yield recording.encode(line)
    yield recording.encode({"end": "copied"})


async def _entries(connection: Connection, stream: str, first: str) -> AsyncIterator[Entry]:
    async for page in pages(connection, stream, first):
        for entry in page:
            yield entry


async def _merged(
    names: tuple[str, ...], read: list[AsyncIterator[Entry]]
) -> AsyncIterator[tuple[str, Entry]]:
    """Entries of several streams in the order in which they were written; ties to the first stream."""
    heap: list[tuple[float, int, Entry]] = []
    for at, entries in enumerate(read):
        async for entry in entries:
            heapq.heappush(heap, (stamped_at(entry[0]), at, entry))
            break
    while heap:
        _, at, entry = heapq.heappop(heap)
        yield names[at], entry
        async for later in read[at]:
            heapq.heappush(heap, (stamped_at(later[0]), at, later))
            break


def _line(reader: Intake, keys: Keys, stream: str, entry: Entry) -> dict[str, object] | None:
    """The line of an entry; None for one that cannot be read, which nobody was told."""
    now = stamped_at(entry[0])
    if stream == keys.decisions:
        try:
            return {"now": now, "noted": codec.decode(Decision, entry[1])}
        except WireError:
            return None
    read = reader.request if stream == keys.requests else partial(reader.fact, stream)
    found = read(entry)
    return None if isinstance(found, Unreadable) else recording.told(found, now)
