"""Trace files: one header line, then one arrival a line.

    {"trace": "demo", "rows": 2, "format": 1, "block": 64, ...}
    {"t": 0.0, "i": 4808, "o": 10}
    {"t": 0.052, "i": 3180, "o": 8, "s": 0, "k": 1, "h": [0, 1]}

Plain or gzip; the caller opens the file, we only read bytes. Field names are short
(`workload.NAMES`), the block size stands once in the header. A file is somebody else's,
so every line is checked and every size bounded.
"""

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from scheduler.errors import UNREADABLE, HeadgateError
from scheduler.sim.workload import Arrival, Workload

FORMAT = 1
LINE_BYTES_MAX = 1 << 20
"One row with 100,000 block ids; the longest seen in a public trace is 4 KB."
ROWS_MAX = 5_000_000
"BurstGPT, the longest public trace, has 5.3 million rows in 121 days; cut it first."
TOKENS_MAX = 100_000_000
"Beyond any context window: such a number is a broken row."
GZIP_MAGIC = b"\x1f\x8b"


class TraceError(HeadgateError):
    """A trace file that is not what it says; the message names file and line."""

    def __init__(self, name: str, line: int, found: str) -> None:
        super().__init__(f"{name}, line {line}: {found}")


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a trace says about itself. Fields that we do not know are left out."""

    trace: str
    "Its name."

    rows: int | None = None
    "How many lines follow; checked when given."

    format: int = FORMAT
    block: int = 0
    "Tokens in a block of `h`; 0 where rows carry none."

    source: str = ""
    licence: str = ""
    made_up: str = ""
    "What did not come from the source: drawn, estimated, filled in."


class Trace(msgspec.Struct, frozen=True):
    """A file's header and its rows, in order of time."""

    header: Header
    arrivals: Workload


_HEADER = msgspec.json.Decoder(Header)
_ROW = msgspec.json.Decoder(Arrival)
_ENCODER = msgspec.json.Encoder()


def read(file: BinaryIO, *, name: str, rows_max: int = ROWS_MAX) -> Trace:
    """The trace in an open file, plain or gzip.

    Args:
        file: opened for bytes, at its start; must be seekable.
        name: what error messages call it.
        rows_max: more rows than this are an error, not a cut.

    Raises:
        TraceError: a line is too long, not JSON, of wrong type or range, out of
            order, or the header's row count is not met.
    """
    numbered = lines(file, name)
    header = _header(name, next(numbered, (1, b""))[1])
    arrivals: list[Arrival] = []
    for number, line in numbered:
        if len(arrivals) >= rows_max:
            raise TraceError(name, number, f"more rows than the limit of {rows_max}")
        arrivals.append(_row(name, number, line, header, arrivals))
    if header.rows is not None and header.rows != len(arrivals):
        raise TraceError(
            name, 1, f"header promises {header.rows} rows, the file has {len(arrivals)}"
        )
    return Trace(header, tuple(arrivals))


def written(header: Header, arrivals: Sequence[Arrival]) -> Iterator[bytes]:
    """The lines of a trace file, header first; `read` gives the same rows back.

    Raises:
        ValueError: two rows have different block sizes, which the format cannot say.
    """
    sizes = sorted({a.block_tokens for a in arrivals if a.blocks})
    if len(sizes) > 1:
        raise ValueError(f"trace {header.trace!r} has block sizes {sizes}, wanted one")
    block = sizes[0] if sizes else 0
    yield _ENCODER.encode(structs.replace(header, rows=len(arrivals), block=block)) + b"\n"
    for a in arrivals:
        yield _ENCODER.encode(structs.replace(a, block_tokens=0)) + b"\n"


def lengths(file: BinaryIO, *, name: str) -> NDArray[np.int64]:
    """Pairs of lengths from a CSV with the columns `prompt` and `output`.

    Such files carry no arrivals: give the pairs to `generate.replayed`, which draws
    the moments. Lines that start with `#` are talk; other columns are passed over.

    Returns:
        int64[n, 2]: prompt and output tokens, both at least 1.

    Raises:
        TraceError: a column is missing or a value is no length.
    """
    numbered = ((n, line) for n, line in lines(file, name) if not line.startswith(b"#"))
    number, head = next(numbered, (1, b""))
    columns = head.decode("utf-8", "replace").split(",")
    for wanted in ("prompt", "output"):
        if wanted not in columns:
            raise TraceError(name, number, f"columns are {columns}, wanted {wanted!r} among them")
    places = (columns.index("prompt"), columns.index("output"))
    pairs: list[tuple[int, int]] = []
    for line_number, line in numbered:
        if len(pairs) >= ROWS_MAX:
            raise TraceError(name, line_number, f"more rows than the limit of {ROWS_MAX}")
        cells = line.split(b",")
        prompt, output = (length(name, line_number, cells, place) for place in places)
        pairs.append((prompt, output))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def length(name: str, line: int, cells: Sequence[bytes], place: int) -> int:
    """The token count in one cell of a CSV row.

    Raises:
        TraceError: the row is too short, or the cell is no whole number in range.
    """
    if place >= len(cells):
        raise TraceError(name, line, f"{len(cells)} columns, wanted at least {place + 1}")
    cell = cells[place].strip()
    # Twelve digits at most: Python's int() is quadratic in a hostile cell.
    if not cell.isdigit() or len(cell) > 12 or not 1 <= int(cell) <= TOKENS_MAX:
        raise TraceError(
            name,
            line,
            f"length is {cell[:40].decode('utf-8', 'replace')!r},"
            f" wanted a whole number from 1 to {TOKENS_MAX}",
        )
    return int(cell)


def lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a plain or gzip file, without their ends; empty ones are passed over.

    Raises:
        TraceError: a line is longer than LINE_BYTES_MAX, or the gzip data is broken.
    """
    is_gzip = file.read(2) == GZIP_MAGIC
    file.seek(0)
    source: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file) if is_gzip else file
    number = 0
    while True:
        number += 1
        try:
            line = source.readline(LINE_BYTES_MAX + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(name, number, f"the gzip data is broken: {error}") from error
        if not line:
            return
        if len(line) > LINE_BYTES_MAX:
            raise TraceError(name, number, f"longer than {LINE_BYTES_MAX} bytes")
        if stripped := line.strip():
            yield number, stripped


def _header(name: str, line: bytes) -> Header:
    try:
        header = _HEADER.decode(line)
    except UNREADABLE as error:
        raise TraceError(
            name,
            1,
            f"{_shown(line)} is no trace header ({error}),"
            ' wanted {"trace": "<name>", "format": 1, ...}',
        ) from error
    if header.format != FORMAT:
        raise TraceError(name, 1, f"format is {header.format}, wanted {FORMAT}")
    return header


def _row(name: str, number: int, line: bytes, header: Header, before: Sequence[Arrival]) -> Arrival:
    try:
        row = _ROW.decode(line)
    except UNREADABLE as error:
        raise TraceError(name, number, f"{_shown(line)}: {error}") from error
    for found, wanted in _faults(row, header, before):
        raise TraceError(name, number, f"{found}, wanted {wanted}")
    return structs.replace(row, block_tokens=header.block) if row.blocks else row


def _faults(row: Arrival, header: Header, before: Sequence[Arrival]) -> Iterable[tuple[str, str]]:
    """What is wrong with a row of the right shape: the value found, the value wanted."""
    earliest_s = before[-1].at_s if before else 0.0
    if not (math.isfinite(row.at_s) and row.at_s >= earliest_s):
        yield f"t is {row.at_s}", f"at least {earliest_s}: rows stand in order of time"
    if not 1 <= row.prompt_tokens <= TOKENS_MAX:
        yield f"i is {row.prompt_tokens}", f"prompt tokens from 1 to {TOKENS_MAX}"
    if not 1 <= row.output_tokens <= TOKENS_MAX:
        yield f"o is {row.output_tokens}", f"output tokens from 1 to {TOKENS_MAX}"
    if row.parent is not None and not 0 <= row.parent < len(before):
        yield f"p is {row.parent}", f"an earlier row, 0 to {len(before) - 1}"
    if row.gap_s is not None and not row.gap_s >= 0:
        yield f"g is {row.gap_s}", "a gap of at least 0 seconds"
    for name in ("ttft", "tpot", "deadline"):
        promised_s = getattr(row, f"{name}_s")
        if promised_s is not None and not promised_s > 0:
            yield f"{name} is {promised_s}", "more than 0 seconds"
    if row.blocks and not header.block:
        yield "h without a block size", "'block' in the header"
    if row.blocks and len(row.blocks) * header.block >= row.prompt_tokens + header.block:
        yield (
            f"{len(row.blocks)} blocks of {header.block} for {row.prompt_tokens} tokens",
            "at most one part-filled block",
        )


def _shown(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", "replace"))
