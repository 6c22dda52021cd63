"""What a request costs an endpoint before anything was learned: physics and data sheets.

    prefill_s = overhead + token_s * uncached + attention_s * uncached * context + decode's share of the steps
    step_s    = step_s + sequence_s * batch + kv_s * (KV tokens read)

Every feature of the predictor is one of these terms **in seconds under the declared hardware**, so the untaught
predictor has weight one on each, and the learned one says how far reality is from the data sheet.
"""

from typing import TypeVar

import msgspec

from scheduler.state import Floats

Tokens = TypeVar("Tokens", float, Floats)

FEATURES = ("overhead", "tokens", "attention", "decode", "decode_tokens")
"The predictor's inputs, in seconds: names as they ride in jobs and rewards."

PARAMETERS = 8e9
"An 8B model is the yardstick; another size shows as a speed that the predictor learns per endpoint."

ATTENTION_TOKENS = 4 * 32 * 4096 / (2 * PARAMETERS)
"Attention of one token over one token of context (32 layers of 4096), as a part of that token's other work."

KV_BYTES = 2 * 32 * 8 * 128 * 2
"KV of one token: 32 layers, 8 KV heads of 128, 16 bit."

CHUNK_TOKENS = 2048
"Prefill tokens a step in vLLM (`max_num_batched_tokens` for chunked prefill): each such step also decodes."


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The rates of one class of endpoint serving the yardstick model."""

    token_s: float
    "Seconds to prefill one token, without attention."

    kv_s: float
    "Seconds to read one token's KV in a decode step."

    step_s: float
    "Seconds of a decode step for one short sequence: the weights are read once."

    overhead_s: float = 0.012
    "Seconds every first token takes besides: front end, tokenizer, scheduling."

    sequence_s: float = 5e-5
    "Seconds that each further sequence adds to a decode step."

    @property
    def attention_s(self) -> float:
        """Seconds of attention for one token over one token of context."""
        return self.token_s * ATTENTION_TOKENS


def _rated(tokens_per_s: float, bytes_per_s: float) -> Hardware:
    """A class from two figures: measured prefill rate at 2k tokens, and the data sheet's memory bandwidth."""
    return Hardware(
        token_s=1 / tokens_per_s,
        kv_s=KV_BYTES / bytes_per_s,
        step_s=2 * PARAMETERS / bytes_per_s,
    )


# Prefill tokens/s of an 8B model in 16 bit at 2k tokens: H100, A100, L40S measured with vLLM; the others scaled by
# the data sheets' dense FP16/BF16 tensor rate. Memory bandwidth: NVIDIA's data sheets.
CLASSES = {
    "h200": _rated(45_000, 4.80e12),
    "h100": _rated(45_000, 3.35e12),
    "a100": _rated(16_000, 2.04e12),
    "l40s": _rated(13_000, 0.864e12),
    "a30": _rated(7_800, 0.933e12),
    "a10": _rated(5_900, 0.600e12),
    "v100": _rated(4_800, 0.900e12),
    "l4": _rated(5_700, 0.300e12),
}

UNKNOWN = _rated(12_000, 1.5e12)
"An undeclared class: the middle of the above on a log scale, within a factor of four of each of them."


def hardware(declared: str) -> Hardware:
    """The rates of a declared class; the neutral ones where it is unknown.

    >>> hardware("A100-SXM4-80GB") is CLASSES["a100"], hardware("abacus") is UNKNOWN
    (True, True)
    """
    plain = declared.lower().replace("nvidia", "").strip(" -_")
    for name in sorted(CLASSES, key=len, reverse=True):
        if plain.startswith(name):
            return CLASSES[name]
    return UNKNOWN


def pairs(uncached: Tokens, prompt: float) -> Tokens:
    """Pairs of attention (a computed token, a token before it) where the last `uncached` tokens of a prompt are computed.

    >>> pairs(4.0, 4.0), pairs(1.0, 4.0)
    (8.0, 3.5)
    """
    return uncached * (prompt - 0.5 * uncached)


def features(
    *, hardware: Hardware, tokens: float, pairs: float, decode_kv: float
) -> tuple[float, ...]:
    """The five terms for one request on one endpoint, in the order of `FEATURES`.

    Args:
        hardware: the endpoint's declared rates.
        tokens: uncached tokens to prefill, its own and those ahead of it.
        pairs: their pairs of attention.
        decode_kv: KV tokens of what decodes there.
    """
    decode_s = hardware.kv_s * decode_kv
    return (
        hardware.overhead_s,
        hardware.token_s * tokens,
        hardware.attention_s * pairs,
        decode_s,
        decode_s * tokens / CHUNK_TOKENS,
    )
