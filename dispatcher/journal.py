"""A reign's recording, written as it happens: the core behind a pen.

1. `begin`     a file of its own in `loop.journal`, with the settings and the seed; the oldest files go
2. `Recorder`  takes the core's place in the loop; a line for each fact and each turn
3. `_roll`     a full file is followed by the reign's next part; it begins with the endpoints that stand
4. `close`     the last line says why nothing follows

The parts of a reign repeat it together, from its first on. Alone, a later one tells of its own time: enough to ask
what other policies would have done, as a copy of the streams is. The core's whole state, which would let it repeat
turns alone, is nothing that we write.

Nothing is written while `loop.journal` is empty, and no code of this file runs then.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import structlog
from msgspec import structs

from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Command, Event
from scheduler.recording import Head
from scheduler.view import Snapshot, View
from scheduler.wire.client import Control
from scheduler.wire.worker import Beat

FLUSH_BYTES, FLUSH_S = 1 << 16, 0.02
"Lines gather until they are so many bytes or so old: what a killed process takes with it. A write costs 20 us."

FILES_KEPT = 8
"Of a pool, newest first."

STANDS_S = 300.0
"Who has sent no beat for so long, far longer than any lease, does not stand in a new part: pods come and go by the thousand."

log = structlog.get_logger()


class Core(Protocol):
    """What the live loop wants of a core."""

    def receive(self, event: Event, now: float) -> None: ...

    def decide(self, now: float) -> list[Command]: ...

    def settle(self) -> None: ...

    def wakeup_at(self) -> float | None: ...

    def view(self, now: float) -> View: ...

    def snapshot(self, *, with_requests: bool = True) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> bool: ...


class Journal:
    """One reign's lines, in files of bounded size. A disk that fails ends the recording, never the dispatcher."""

    def __init__(self, head: Head, open_file: Callable[[int], BinaryIO], *, bytes_max: int) -> None:
        """Begin part 0.

        Args:
            head: of the reign.
            open_file: by a part's number; raises OSError.
            bytes_max: at which the next part begins.
        """
        self._head = head
        self._open = open_file
        self._bytes_max = bytes_max
        self._buffer = bytearray()
        self._written = 0
        self._flushed_at = 0.0
        self.beats: dict[str, tuple[float, Beat]] = {}
        "The last of each endpoint, and when it was told."
        self.drained: dict[str, None] = {}
        "Those that people have drained."
        self._file: BinaryIO | None = open_file(0)
        self.add(head)

    @property
    def is_open(self) -> bool:
        """Whether it still records."""
        return self._file is not None

    def add(self, line: object) -> None:
        """One more line; kept here until there are enough."""
        if self._file is not None:
            recording.ENCODER.encode_into(line, self._buffer, -1)
            self._buffer += b"\n"

    def note(self, control: Control) -> None:
        """Remember who is drained: the next part begins with it."""
        self.drained.pop(control.endpoint, None)
        if control.action == "drain":
            self.drained[control.endpoint] = None

    def flush_by(self, now: float) -> None:
        """Write what has gathered, if it is much or old."""
        if len(self._buffer) >= FLUSH_BYTES or now - self._flushed_at >= FLUSH_S:
            self._flushed_at = now
            self._flush()
            if self._written >= self._bytes_max:
                self._roll(now)

    def close(self, reason: str) -> bool:
        """Nothing follows in this file, and why; whether all of it is written. Once."""
        self.add({"end": reason})
        self._flush()
        if self._file is None:
            return False
        self._file.close()
        self._file = None
        return True

    def _roll(self, now: float) -> None:
        if not self.close("rolled"):
            return  # lines are missing: what followed would be replayed as if none were
        self._head = structs.replace(self._head, part=self._head.part + 1)
        self._written = 0
        try:
            self._file = self._open(self._head.part)
        except OSError as error:
            log.warning("journal_ended", reason=str(error))
            return
        self.add(self._head)
        self.beats = {name: told for name, told in self.beats.items() if now - told[0] < STANDS_S}
        standing = [beat for _, beat in self.beats.values()]
        self.add({"now": now, "standing": standing, "drained": [*self.drained]})

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
        self.settle = core.settle
        self.wakeup_at = core.wakeup_at
        self.view = core.view
        self.snapshot = core.snapshot

    def receive(self, event: Event, now: float) -> None:
        """As the core's."""
        if isinstance(event, Beat):
            self._journal.beats[event.endpoint] = now, event
        elif isinstance(event, Control):
            self._journal.note(event)
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
        self._journal.drained.update(dict.fromkeys(snapshot.drained))
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
    """The journal of the reign that begins now; of the pool's older files some are kept.

    None, and a warning, where it cannot be written: a full disk must not keep a standby from leading.
    """
    folder = Path(directory) / pool

    def open_file(part: int) -> BinaryIO:
        path = folder / f"{round(now * 1e3)}-{epoch}-{part:04}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*-*.jsonl"))[: 1 - FILES_KEPT]:
            old.unlink(missing_ok=True)
        log.info("journal", path=str(path))
        return path.open("xb")

    head = recording.head(settings, seed=epoch, version=version, pool=pool)
    try:
        return Journal(head, open_file, bytes_max=bytes_max)
    except OSError as error:
        log.warning("journal_not_begun", path=str(folder), reason=error.strerror)
        return None
