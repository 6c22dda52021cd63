"""Other people's files as traces: public traces, batches, benchmark results, plain CSV.

Each converter reads an open file and returns a `Trace` whose header says what was made up.
A converter never guesses in silence: a line it cannot read is an error with file and line.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

import msgspec
import numpy as np
from msgspec import structs

from scheduler.errors import UNREADABLE
from scheduler.sim.body import TOKEN_BYTES
from scheduler.sim.trace import ROWS_MAX, Header, Trace, TraceError, length, lines
from scheduler.sim.workload import Arrival

T = TypeVar("T")

RESULT_BYTES_MAX = 1 << 30
"A vLLM result with every gap between tokens of 100,000 requests is about 400 MB."
BATCH_OUTPUT_TOKENS = 256
"Taken where a batch line sets no bound: about the mean of public chat traces (211 - 346)."
MOONCAKE_BLOCK = 512


class _Mooncake(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


class _Part(msgspec.Struct, frozen=True):
    text: str = ""


class _Message(msgspec.Struct, frozen=True):
    content: str | list[_Part] | None = None


class _BatchBody(msgspec.Struct, frozen=True):
    messages: list[_Message] = []
    prompt: str | list[int | str] = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class _BatchLine(msgspec.Struct, frozen=True):
    body: _BatchBody


class _Bench(msgspec.Struct, frozen=True):
    input_lens: list[int]
    output_lens: list[int]
    start_times: list[float] = []
    request_rate: float | str = "inf"


def azure(file: BinaryIO, *, name: str) -> Trace:
    """An Azure LLM inference trace: TIMESTAMP,ContextTokens,GeneratedTokens."""
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return _trace(name, _cells(file, name, columns, _stamp), "nothing")


def csv(file: BinaryIO, *, name: str) -> Trace:
    """A CSV with the columns arrival (seconds), prompt and output (tokens)."""
    return _trace(name, _cells(file, name, ("arrival", "prompt", "output"), _seconds), "nothing")


def mooncake(file: BinaryIO, *, name: str) -> Trace:
    """A Mooncake trace: milliseconds, lengths and prefix hashes of 512-token blocks.

    Its clock ticks every 3 s and rows of one tick stay together here: see `workload.spread`.
    """
    decoder = msgspec.json.Decoder(_Mooncake)
    rows = []
    for number, line in _bounded(lines(file, name), name):
        row = _decoded(decoder, name, number, line)
        _check_lengths(name, number, row.input_length, row.output_length)
        rows.append(
            Arrival(
                at_s=row.timestamp / 1000,
                prompt_tokens=row.input_length,
                output_tokens=row.output_length,
                blocks=row.hash_ids,
                block_tokens=MOONCAKE_BLOCK if row.hash_ids else 0,
            )
        )
    return _trace(name, rows, "nothing")


def openai_batch(file: BinaryIO, *, name: str) -> Trace:
    """An OpenAI Batch file; every request arrives at 0.

    Prompt lengths are bytes / 4 (exact where the prompt is a list of ids); output lengths are
    the bound the request sets, or BATCH_OUTPUT_TOKENS.
    """
    decoder = msgspec.json.Decoder(_BatchLine)
    rows = []
    for number, line in _bounded(lines(file, name), name):
        body = _decoded(decoder, name, number, line).body
        output = body.max_completion_tokens or body.max_tokens or BATCH_OUTPUT_TOKENS
        _check_lengths(name, number, prompt := _prompt_tokens(body), output)
        rows.append(Arrival(at_s=0.0, prompt_tokens=prompt, output_tokens=output))
    return _trace(name, rows, "prompt = bytes/4; output = max_tokens or 256; arrivals all at 0")


def vllm_bench(file: BinaryIO, *, name: str) -> Trace:
    """The result of `vllm bench serve --save-result --save-detailed`.

    Arrivals are its start times where it has them, else even at its request rate; at an
    endless rate all come at 0.
    """
    text = file.read(RESULT_BYTES_MAX + 1)
    if len(text) > RESULT_BYTES_MAX:
        raise TraceError(name, 1, f"longer than {RESULT_BYTES_MAX} bytes")
    found = _decoded(msgspec.json.Decoder(_Bench), name, 1, text)
    n = len(found.input_lens)
    if len(found.output_lens) != n:
        raise TraceError(name, 1, f"{n} input_lens and {len(found.output_lens)} output_lens")
    moments, made_up = _bench_moments(found, n)
    if len(moments) != n:
        raise TraceError(name, 1, f"{n} input_lens and {len(moments)} start_times")
    rows = [
        Arrival(at_s=at, prompt_tokens=prompt, output_tokens=output)
        for at, prompt, output in zip(moments, found.input_lens, found.output_lens, strict=True)
        # A request that failed is written with no output: it never became work.
        if prompt > 0 and output > 0
    ]
    return _trace(name, rows, made_up)


FORMATS: dict[str, Callable[..., Trace]] = {
    "azure": azure,
    "mooncake": mooncake,
    "openai-batch": openai_batch,
    "vllm-bench": vllm_bench,
    "csv": csv,
}
"By the name that the command line knows."


def _trace(name: str, rows: Sequence[Arrival], made_up: str) -> Trace:
    """The rows in order of time, the first at 0."""
    order = sorted(rows, key=lambda a: a.at_s)
    start_s = order[0].at_s if order else 0.0
    # Rounded to 0.1 us: beyond that the digits are the subtraction's, not the source's.
    arrivals = tuple(structs.replace(a, at_s=round(a.at_s - start_s, 7)) for a in order)
    return Trace(Header(trace=name, made_up=made_up), arrivals)


def _cells(
    file: BinaryIO,
    name: str,
    columns: tuple[str, str, str],
    moment: Callable[[bytes], float],
) -> list[Arrival]:
    """Rows of a CSV with a moment, a prompt and an output column, wherever they stand."""
    numbered = lines(file, name)
    number, head = next(numbered, (1, b""))
    found = [cell.strip() for cell in head.decode("utf-8-sig", "replace").split(",")]
    for wanted in columns:
        if wanted not in found:
            raise TraceError(
                name, number, f"columns are {found[:20]}, wanted {wanted!r} among them"
            )
    at, prompt, output = (found.index(wanted) for wanted in columns)
    rows = []
    for line_number, line in _bounded(numbered, name):
        cells = line.split(b",")
        prompt_tokens = length(name, line_number, cells, prompt)
        output_tokens = length(name, line_number, cells, output)
        try:
            at_s = moment(cells[at] if at < len(cells) else b"")
        except ValueError as error:
            raise TraceError(name, line_number, f"{columns[0]}: {error}") from error
        rows.append(Arrival(at_s=at_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens))
    return rows


def _bounded(numbered: Iterator[tuple[int, bytes]], name: str) -> Iterator[tuple[int, bytes]]:
    for count, (number, line) in enumerate(numbered):
        if count >= ROWS_MAX:
            raise TraceError(name, number, f"more rows than the limit of {ROWS_MAX}")
        yield number, line


def _seconds(cell: bytes) -> float:
    at_s = float(cell[:40])
    if not np.isfinite(at_s):
        raise ValueError(f"moment is {at_s}, wanted a finite number of seconds")
    return at_s


def _stamp(cell: bytes) -> float:
    """Seconds of a stamp such as 2023-11-16 18:17:03.9799600."""
    # NumPy also takes "NaT" for a moment, and "now" for the clock that we never read.
    if not cell[:4].isdigit():
        raise ValueError(f"moment is {cell[:40]!r}, wanted YYYY-MM-DD hh:mm:ss")
    stamp = np.datetime64(cell[:40].decode("ascii", "replace").strip(), "ns")
    # Nanoseconds since 1970 do not fit a float: take whole seconds and the rest apart.
    whole, rest = divmod(int(stamp.astype(np.int64)), 10**9)
    return whole + rest / 1e9


def _decoded(decoder: msgspec.json.Decoder[T], name: str, number: int, line: bytes) -> T:
    try:
        return decoder.decode(line)
    except UNREADABLE as error:
        shown = repr(line[:80].decode("utf-8", "replace"))
        raise TraceError(name, number, f"{shown}: {error}") from error


def _check_lengths(name: str, number: int, prompt: int, output: int) -> None:
    if prompt < 1 or output < 1:
        raise TraceError(
            name, number, f"{prompt} prompt and {output} output tokens, wanted at least 1 of each"
        )


def _prompt_tokens(body: _BatchBody) -> int:
    if body.prompt and isinstance(body.prompt, list) and isinstance(body.prompt[0], int):
        return len(body.prompt)
    texts = [body.prompt] if isinstance(body.prompt, str) else [str(p) for p in body.prompt]
    for message in body.messages:
        content = message.content or ""
        texts.extend([content] if isinstance(content, str) else [part.text for part in content])
    return -(-sum(len(text.encode()) for text in texts) // TOKEN_BYTES)


def _bench_moments(found: _Bench, n: int) -> tuple[list[float], str]:
    if found.start_times:
        return found.start_times, "nothing"
    rate = float(found.request_rate)
    if 0 < rate < np.inf:
        return [i / rate for i in range(n)], "arrivals, even at the request rate"
    return [0.0] * n, "arrivals, all at 0"
