"""A reign's recording, written as it happens: the core behind a pen.

1. `begin`     a file of its own in `loop.journal`, with the settings and the seed; the oldest files go
2. `Recorder`  takes the core's place in the loop; a line for each fact and each turn
3. `close`     the last line says why nothing follows

Nothing is written while `loop.journal` is empty, and no code of this file runs then.
"""

from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec
import structlog

from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Command, Event
from scheduler.view import Snapshot, View

FLUSH_BYTES, FLUSH_S = 1 << 16, 0.02
"Lines gather until they are so many bytes or so old: what a killed process takes with it. A write costs 20 us."

FILES_KEPT = 8
"Of a pool, newest first; one reign is one file."

log = structlog.get_logger()


class Core(Protocol):
    """What the live loop wants of a core."""

    def receive(self, event: Event, now: float) -> None: ...

    def decide(self, now: float) -> list[Command]: ...

    def wakeup_at(self) -> float | None: ...

    def view(self, now: float) -> View: ...

    def snapshot(self, *, with_requests: bool = True) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> bool: ...


class Journal:
    """One open file of bounded size. A disk that fails ends the recording, never the dispatcher."""

    def __init__(self, file: BinaryIO, *, bytes_max: int) -> None:
        """Write to this file, at most so many bytes and the line that says so."""
        self._file: BinaryIO | None = file
        self._bytes_max = bytes_max
        self._encoder = msgspec.json.Encoder(enc_hook=lambda value: value.item())
        self._buffer = bytearray()
        self._written = 0
        self._flushed_at = 0.0

    def add(self, line: object) -> None:
        """One more line; kept here until there are enough."""
        if self._file is not None:
            self._encoder.encode_into(line, self._buffer, -1)
            self._buffer += b"\n"

    def flush_by(self, now: float) -> None:
        """Write what has gathered, if it is much or old."""
        if len(self._buffer) >= FLUSH_BYTES or now - self._flushed_at >= FLUSH_S:
            self._flushed_at = now
            self._flush()
            if self._written >= self._bytes_max:
                log.warning("journal_full", bytes=self._written)
                self.close("full")

    def close(self, reason: str) -> None:
        """Nothing follows, and why; once."""
        if self._file is None:
            return
        self.add({"end": reason})
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file.write(self._buffer)
            self._file.flush()
        except OSError as error:
            log.warning("journal_ended", reason=str(error))
            self._file = None
        self._written += len(self._buffer)
        self._buffer.clear()


class Recorder:
    """A core that writes down what it is told before it is told it: what makes it crash is the last line."""

    def __init__(self, core: Scheduler, journal: Journal) -> None:
        """Stand before this core."""
        self._core = core
        self._journal = journal
        self.wakeup_at = core.wakeup_at
        self.view = core.view
        self.snapshot = core.snapshot

    def receive(self, event: Event, now: float) -> None:
        """As the core's."""
        self._journal.add(recording.told(event, now))
        self._core.receive(event, now)

    def decide(self, now: float) -> list[Command]:
        """As the core's."""
        commands = self._core.decide(now)
        self._journal.add(recording.decided(commands, now))
        self._journal.flush_by(now)
        return commands

    def restore(self, snapshot: Snapshot) -> bool:
        """As the core's."""
        self._journal.add({"restored": snapshot})
        return self._core.restore(snapshot)


def begin(
    directory: str,
    settings: CoreSettings,
    *,
    pool: str,
    epoch: int,
    version: str,
    now: float,
    bytes_max: int,
) -> Journal | None:
    """The journal of the reign that begins now; of the pool's older ones some are kept.

    None, and a warning, where it cannot be written: a full disk must not keep a standby from leading.
    """
    path = Path(directory) / pool / f"{round(now * 1e3)}-{epoch}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in sorted(path.parent.glob("*-*.jsonl"))[: 1 - FILES_KEPT]:
            old.unlink(missing_ok=True)
        file = path.open("xb")
    except OSError as error:
        log.warning("journal_not_begun", path=str(path), reason=error.strerror)
        return None
    journal = Journal(file, bytes_max=bytes_max)
    journal.add(recording.head(settings, seed=epoch, version=version, pool=pool))
    log.info("journal", path=str(path))
    return journal
