"""A file of requests in, a file of answers out, and nothing lost in between.

    1. Every id follows from the file's hash and the line's `custom_id`: the same file is the same requests.
    2. Lines whose answer is written already are passed over. A failure is this file's: in one that was mended it is tried again.
    3. The rest is submitted, a bounded number at a time. What Redis knows from an earlier run is not sent again:
       its answer is taken where it lies, or waited for.
    4. Answers are appended as they come, in any order, whole lines only.

So whatever ends a run (a crash, Ctrl-C), the same command goes on where it stopped.
"""

import asyncio
import contextlib
import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec

from dispatcher.client.client import BATCH, Client
from dispatcher.client.handle import Handle
from dispatcher.client.wishes import Wishes
from scheduler.errors import UNREADABLE, SettingsError, WireError
from scheduler.wire.client import Request
from scheduler.wire.words import PATHS
from scheduler.wire.worker import Result

IN_FLIGHT = 512
"Requests of one batch in Redis at a time: enough for a large fleet's seats, little to hold here."

PRIORITY = -1
"A batch fills the valleys of whatever else runs."

LINE_BYTES = 64 * 2**20
"The longest line read; a body may be 16 MB and JSON may escape every byte."

HASHED = 12
"Bytes of hash in an id."

TORN = b'{"id":"batch_req_'
"How a line begins that a crash cut short: what else stands at an output's end is somebody's, and not ours to cut."


class Line(msgspec.Struct, frozen=True):
    """One line of an OpenAI batch file."""

    custom_id: str
    body: dict[str, Any]
    method: Literal["POST"] = "POST"
    url: str = PATHS[0]


class Response(msgspec.Struct, frozen=True):
    """What the engine said."""

    status_code: int
    request_id: str
    body: object


class Fault(msgspec.Struct, frozen=True):
    """Why there is no response."""

    code: str
    "The outcome, or `invalid_line`."

    message: str
    line: int


class Answer(msgspec.Struct, frozen=True):
    """One line of the output."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Fault | None


class Tally(msgspec.Struct):
    """How far a batch is."""

    lines: int = 0
    written_before: int = 0
    completed: int = 0
    failed: int = 0
    "Bad lines and requests that ended other than completed, in this run."

    failed_before: int = 0

    @property
    def done(self) -> int:
        """Lines that have their answer."""
        return self.written_before + self.completed + self.failed


class Batch:
    """One batch file and where its answers go."""

    def __init__(self, source: Path, sink: Path, errors: Path | None = None) -> None:
        """Hash the file and count its lines; `errors` None writes failures into the sink too.

        Raises:
            SettingsError: the file cannot be read, or answers would go into it.
        """
        self._source, self._sink, self._errors = source, sink, errors or sink
        self.tally = Tally()
        digest = hashlib.sha256()
        try:
            with source.open("rb") as file:
                for line in file:
                    digest.update(line)
                    self.tally.lines += bool(line.strip())
        except OSError as error:
            raise SettingsError(f"batch {str(source)!r} cannot be read: {error.strerror}") from None
        self.id = digest.hexdigest()[: 2 * HASHED]
        for path in (self._sink, self._errors):
            if path.exists() and path.samefile(source):  # it would be answered for ever
                raise SettingsError(
                    f"output {str(path)!r} is the batch itself, wanted another file"
                )

    @property
    def client_name(self) -> str:
        """The reply stream's name: every run of this batch reads the same one."""
        return f"batch-{self.id}"

    async def run(
        self,
        client: Client,
        *,
        wishes: Wishes,
        told: Callable[[str], None],
        moved: Callable[[Tally], None],
        in_flight: int = IN_FLIGHT,
    ) -> Tally:
        """Carry it to its end.

        Args:
            client: of this batch's `client_name`.
            wishes: promises that hold for every line.
            told: is given a line for the person whenever a line fails.
            moved: is given the tally whenever it has changed.
            in_flight: the most requests in Redis at a time.

        Raises:
            SettingsError: another run of it is writing, or a file cannot be written.
        """
        with contextlib.ExitStack() as files:
            sink = files.enter_context(_appended(self._sink))
            errors = (
                sink if self._errors == self._sink else files.enter_context(_appended(self._errors))
            )
            pen = _Pen(
                sink,
                errors,
                batch=self.client_name,
                tally=self.tally,
                source=self._source.name,
                told=told,
                moved=moved,
            )
            seen = self._answered()
            todo = self._todo(pen, seen)
            await self._flow(client, todo, pen, wishes, in_flight)
        return self.tally

    def request_id(self, custom_id: str) -> str:
        """The id of a line's request, the same in every run."""
        return f"{self.client_name}-{hashlib.sha256(custom_id.encode()).hexdigest()[: 2 * HASHED]}"

    def _answered(self) -> "_Seen":
        """What earlier runs have written: answers of any file, faults of this one, whose lines have the same numbers."""
        seen, own = _Seen(set(), set()), f"batch_req_{self.client_name}-"
        for path in {self._sink, self._errors}:
            with path.open("rb") as file:
                for raw in file:
                    with contextlib.suppress(*UNREADABLE):
                        answer = msgspec.json.decode(raw, type=Answer)
                        if answer.error is not None and not answer.id.startswith(own):
                            continue
                        if answer.custom_id is not None:
                            seen.custom_ids.add(answer.custom_id)
                        if answer.error is not None:
                            seen.lines.add(answer.error.line)
        self.tally.failed_before = len(seen.lines)
        return seen

    def _todo(self, pen: "_Pen", seen: "_Seen") -> Iterator[tuple[int, Line]]:
        """Lines that still want an answer; bad ones get theirs here."""
        for number, raw in _lines(self._source):
            if number in seen.lines:
                self.tally.written_before += 1
                continue
            try:
                line = _parsed(raw)
            except WireError as error:
                pen.fail(number, None, "", Fault("invalid_line", str(error), number))
                continue
            if line.custom_id in seen.custom_ids:
                if line.custom_id in seen.here:
                    found = f"custom_id {line.custom_id!r} stands on line {seen.here[line.custom_id]} too"
                    pen.fail(number, None, "", Fault("invalid_line", found, number))
                    continue
                self.tally.written_before += 1
            else:
                yield number, line
            seen.here[line.custom_id] = number
            seen.custom_ids.add(line.custom_id)

    async def _flow(
        self,
        client: Client,
        todo: Iterator[tuple[int, Line]],
        pen: "_Pen",
        wishes: Wishes,
        in_flight: int,
    ) -> None:
        ended: asyncio.Queue[Handle] = asyncio.Queue()
        waiting: dict[str, tuple[int, Line]] = {}
        again: list[tuple[int, Line]] = []
        is_more = True
        while is_more or waiting or again:
            room = min(BATCH, in_flight - len(waiting))
            taken = again[:room] or list(islice(todo, room))
            again = again[room:]
            is_more = is_more and (room == 0 or len(taken) > 0 or bool(again))
            rows = self._requests(client, taken, pen, wishes)
            handles = await client.submit_many(request for request, _ in rows)
            pause_s = 0.0
            for handle, (_, row) in zip(handles, rows, strict=True):
                if handle.is_turned_away:
                    again.append(row)
                    pause_s = (await handle.record()).retry_after_s or 0.0
                else:
                    waiting[handle.id] = row
                    handle.when_done(ended.put_nowait)
            if pause_s and not waiting:
                await asyncio.sleep(pause_s)
            if waiting and (not rows or pause_s or len(waiting) >= in_flight):
                await _write(await ended.get(), waiting, pen)
            while not ended.empty():
                await _write(ended.get_nowait(), waiting, pen)

    def _requests(
        self, client: Client, taken: Iterable[tuple[int, Line]], pen: "_Pen", wishes: Wishes
    ) -> list[tuple[Request, tuple[int, Line]]]:
        """The requests of these lines, without those that can never be served."""
        built = []
        for number, line in taken:
            request_id = self.request_id(line.custom_id)
            own: Wishes = {"id": request_id, "path": line.url, "stream": False}
            try:
                built.append((client.request(line.body, **(wishes | own)), (number, line)))
            except WireError as error:
                fault = Fault("invalid", str(error), number)
                pen.fail(number, line.custom_id, request_id, fault)
        return built


class _Seen(msgspec.Struct):
    custom_ids: set[str]
    lines: set[int]
    here: dict[str, int] = {}
    "Those of this run, and where they stand."


class _Pen:
    """Writes whole lines, at once."""

    def __init__(
        self,
        sink: FileIO,
        errors: FileIO,
        *,
        batch: str,
        tally: Tally,
        source: str,
        told: Callable[[str], None],
        moved: Callable[[Tally], None],
    ) -> None:
        self._sink, self._errors, self._batch, self._tally = sink, errors, batch, tally
        self._source, self._told, self._moved = source, told, moved

    def write(self, number: int, line: Line, record: Result) -> None:
        if record.outcome != "completed":
            fault = Fault(record.outcome, record.reason, number)
            self.fail(number, line.custom_id, record.id, fault)
            return
        body = msgspec.Raw(record.body or b"null")
        response = Response(record.status or 200, record.id, body)
        answer = Answer(f"batch_req_{record.id}", line.custom_id, response, None)
        _append(self._sink, answer)
        self._tally.completed += 1
        self._moved(self._tally)

    def fail(self, number: int, custom_id: str | None, request_id: str, fault: Fault) -> None:
        request_id = request_id or f"{self._batch}-line-{number}"
        answer = Answer(f"batch_req_{request_id}", custom_id, None, fault)
        _append(self._errors, answer)
        self._tally.failed += 1
        self._moved(self._tally)
        self._told(f"{self._source}, line {number}: {fault.code}: {fault.message}")


async def _write(handle: Handle, waiting: dict[str, tuple[int, Line]], pen: _Pen) -> None:
    number, line = waiting.pop(handle.id)
    pen.write(number, line, await handle.record())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LINE_BYTES + 1):
            number += 1
            if raw.strip():
                yield number, raw


def _parsed(raw: bytes) -> Line:
    """One line, checked.

    Raises:
        WireError: what is wrong with it.
    """
    if len(raw) > LINE_BYTES:
        raise WireError(f"it is longer than {LINE_BYTES} bytes")
    try:
        line = msgspec.json.decode(raw, type=Line)
    except UNREADABLE as error:
        raise WireError(str(error)) from None
    if line.url not in PATHS:
        raise WireError(f"field 'url' is {line.url[:60]!r}, wanted {' or '.join(PATHS)}")
    return line


def _append(file: FileIO, answer: Answer) -> None:
    line = msgspec.json.encode(answer) + b"\n"
    try:
        while line:  # a disk that fills up takes a part first; the next run cuts it off
            line = line[file.write(line) :]
    except OSError as error:
        raise SettingsError(
            f"output {str(file.name)!r} cannot be written: {error.strerror}; run it again to go on"
        ) from None


@contextlib.contextmanager
def _appended(path: Path) -> Iterator[FileIO]:
    """The file, ours alone, behind its last whole line; each write is out at once."""
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise SettingsError(f"output {str(path)!r} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(f"output {str(path)!r} is being written by another run") from None
        try:
            _cut(file)
        except OSError:
            raise SettingsError(
                f"output {str(path)!r} is no file, wanted one to go on in"
            ) from None
        yield file


def _cut(file: FileIO) -> None:
    """Drop the line at its end that was not written whole."""
    file.seek(whole := _whole(file))
    tail = file.read(len(TORN))
    if not TORN.startswith(tail):
        raise SettingsError(
            f"output {str(file.name)!r} ends in {tail!r}, wanted answers of a batch or a new file"
        )
    if tail:
        file.truncate(whole)


def _whole(file: FileIO) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, 2)
    while end:
        size = min(end, 1 << 16)
        file.seek(end - size)
        newline = file.read(size).rfind(b"\n")
        if newline >= 0:
            return end - size + newline + 1
        end -= size
    return 0
