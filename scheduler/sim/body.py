"""The OpenAI body of an arrival: a prompt of exactly the right length, made of nothing.

The text form counts as the emulated engine does, 4 UTF-8 bytes a token. The token form
is for real vLLM, whose tokenizer would make any other number out of a text. Equal block ids
at equal positions give equal leading bytes, so prefix caches see what the trace saw.
"""

import struct
from functools import lru_cache
from typing import Literal

import msgspec

from scheduler.sim.workload import Arrival

TOKEN_BYTES = 4
"What one token weighs in the emulated engine."
FIRST_TOKEN = 1000
"Below it lie the special tokens of every tokenizer we know."
VOCABULARY = 32_000
"Llama 2's, the smallest in common use: such ids exist everywhere."
DIGITS = 16
"Ids to spell a 128-bit number in the smallest vocabulary allowed; one vLLM block."
MAX_TOKENS_LEAST = 256
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
"Where a body of each face is posted."

Face = Literal["completions", "chat"]
Form = Literal["text", "tokens"]


class _Hint(msgspec.Struct, frozen=True):
    """The truth that only an emulated engine reads; real vLLM passes it by."""

    output_tokens: int


class _Completion(msgspec.Struct, frozen=True):
    model: str
    prompt: str | msgspec.Raw
    max_tokens: int
    stream: bool
    vllm_xargs: _Hint


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class _Chat(msgspec.Struct, frozen=True):
    model: str
    messages: tuple[_Message]
    max_tokens: int
    stream: bool
    vllm_xargs: _Hint


def body(
    arrival: Arrival,
    model: str,
    form: Form = "text",
    *,
    face: Face = "completions",
    stream: bool = True,
    row: int = 0,
    vocabulary: int = VOCABULARY,
    max_tokens: int | None = None,
) -> bytes:
    """The JSON to post for this arrival.

    Args:
        arrival: what arrives.
        model: the name the engine serves.
        form: `text`, or `tokens` for a list of token ids.
        face: the endpoint it is meant for, see `PATHS`. A chat template adds tokens of its
            own on a real engine; the emulated one counts the content only.
        stream: whether tokens are to come as they are made.
        row: the arrival's place in the workload. Parts of a prompt without block ids are
            unique by it; count on when a workload is played twice.
        vocabulary: ids run from FIRST_TOKEN up to here.
        max_tokens: the bound sent; None takes `bound`. A power of two near the truth is still
            a hint: give one number for all where predictors are judged.

    Raises:
        ValueError: a chat of token ids, which the API does not have, or a vocabulary too
            small to tell blocks apart.
    """
    most = bound(arrival.output_tokens) if max_tokens is None else max_tokens
    hint = _Hint(arrival.output_tokens)
    if form == "tokens":
        if face == "chat":
            raise ValueError("form is 'tokens' and face 'chat', wanted 'completions' for token ids")
        ids = msgspec.Raw(_ids(arrival, row, vocabulary))
        return msgspec.json.encode(_Completion(model, ids, most, stream, hint))
    prompt = _text(arrival, row)
    if face == "chat":
        message = _Message("user", prompt)
        return msgspec.json.encode(_Chat(model, (message,), most, stream, hint))
    return msgspec.json.encode(_Completion(model, prompt, most, stream, hint))


def bound(output_tokens: int) -> int:
    """A round `max_tokens`: the next power of two above twice the truth, at least 256.

    >>> bound(13), bound(128), bound(1000)
    (256, 512, 2048)
    """
    return max(MAX_TOKENS_LEAST, 1 << (2 * output_tokens).bit_length())


def _text(arrival: Arrival, row: int) -> str:
    size = TOKEN_BYTES * arrival.prompt_tokens
    block_size = TOKEN_BYTES * arrival.block_tokens
    parts = [_filled(f"b{_backwards(block, 14)} ", block_size) for block in arrival.blocks]
    rest = size - block_size * len(parts)
    if rest > 0:
        parts.append(_filled(f"u{_backwards(_mark(arrival, row), 24)} ", rest))
    return "".join(parts)[:size]


def _backwards(number: int, width: int) -> str:
    """Hex, the lowest digit first, so that even the smallest block tells ids apart."""
    return f"{number:0{width}x}"[::-1]


def _filled(unit: str, size: int) -> str:
    """Exactly `size` characters of a repeated unit, which comes first whole."""
    return (unit * (size // len(unit) + 1))[:size]


def _mark(arrival: Arrival, row: int) -> int:
    """A number no other row of a workload has; made from the moment and the row only."""
    (moment,) = struct.unpack(">Q", struct.pack(">d", arrival.at_s))
    return (row % (1 << 48)) << 64 | int(moment)


def _ids(arrival: Arrival, row: int, vocabulary: int) -> bytes:
    """The prompt as a JSON list of token ids."""
    if vocabulary < 2 * FIRST_TOKEN:
        raise ValueError(f"vocabulary is {vocabulary}, wanted at least {2 * FIRST_TOKEN}")
    parts = []
    wanted = arrival.prompt_tokens
    for block in arrival.blocks:
        n = min(arrival.block_tokens, wanted)
        parts.append(_block_ids(block, n, vocabulary))
        wanted -= n
    if wanted > 0:
        # Above any block id, so that no tail equals a block.
        parts.append(_spelt((1 << 120) | _mark(arrival, row), wanted, vocabulary))
    return b"[" + b",".join(part for part in parts if part) + b"]"


@lru_cache(maxsize=4096)
def _block_ids(block: int, n: int, vocabulary: int) -> bytes:
    """One block's ids; remembered, for a session sends its blocks again every turn."""
    return _spelt(block, n, vocabulary)


def _spelt(number: int, n: int, vocabulary: int) -> bytes:
    """`n` ids that spell a number, lowest digit first, over and over.

    The width is fixed: else 5 and 55 would both go on as 5 5 5 5.
    """
    base = vocabulary - FIRST_TOKEN
    digits = []
    for _ in range(DIGITS):
        number, digit = divmod(number, base)
        digits.append(b"%d" % (FIRST_TOKEN + digit))
    return b",".join((digits * (n // DIGITS + 1))[:n])
