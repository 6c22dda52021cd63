"""What a client may wish for by header: our own names, llm-d's and vLLM's, one table.

Our own name wins over an alias. An empty value is no value.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from dispatcher.client.wishes import Wishes
from dispatcher.door.refusal import Refusal

T = TypeVar("T")

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")

MILLISECONDS_MAX = 1e12
"Thirty years: nobody waits longer, and nothing overflows."


def wishes(headers: Mapping[str, str]) -> Wishes:
    """What these headers wish for.

    Raises:
        Refusal: 400, naming the header, the value found and the value wanted.
    """
    found: Wishes = {}
    for wish, names in TABLE.items():
        for name, read in names:
            value = headers.get(name, "").strip()
            if not value:
                continue
            try:
                found[wish] = read(value)  # type: ignore[literal-required]  # a key of Wishes
            except ValueError as error:
                raise Refusal(
                    400, "invalid", f"header {name!r} is {value[:60]!r}, wanted {error}", param=name
                ) from None
            break
    return found


def duration_s(text: str) -> float:
    """A duration as Go writes them, which is what llm-d's TTL is.

    >>> duration_s("1500ms"), duration_s("1m30s"), duration_s("0")
    (1.5, 90.0, 0.0)
    """
    if text == "0":
        return 0.0
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration such as 1500ms or 2s")
    return float(sum(float(number) * _UNITS_S[unit] for number, unit in parts))


def _positive_duration_s(text: str) -> float | None:
    """None for 0: llm-d's word for no limit of its own."""
    return duration_s(text) or None


def _milliseconds(text: str) -> float:
    number = _number(text, float, "milliseconds, more than 0")
    if not 0 < number <= MILLISECONDS_MAX or math.isnan(number):
        raise ValueError("milliseconds, more than 0")
    return number / 1e3


def _whole(text: str) -> int:
    return _number(text, int, "a whole number")


def _lower_first(text: str) -> int:
    return -_whole(text)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are none came as lone surrogates
        raise ValueError("UTF-8") from None
    return text


def _number(text: str, kind: Callable[[str], T], wanted: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(wanted) from None


TABLE: dict[str, tuple[tuple[str, Callable[[str], object]], ...]] = {
    "objective": (("x-headgate-objective", _text), ("x-llm-d-inference-objective", _text)),
    "tenant": (("x-headgate-tenant", _text), ("x-llm-d-inference-fairness-id", _text)),
    "session": (("x-headgate-session", _text), ("x-session-id", _text)),
    "ttft_s": (("x-headgate-ttft-ms", _milliseconds), ("x-llm-d-slo-ttft-ms", _milliseconds)),
    "tpot_s": (("x-headgate-tpot-ms", _milliseconds), ("x-llm-d-slo-tpot-ms", _milliseconds)),
    "deadline_s": (("x-headgate-deadline-ms", _milliseconds),),
    "max_queue_s": (
        ("x-headgate-max-queue-ms", _milliseconds),
        ("x-llm-d-inference-ttl", _positive_duration_s),
    ),
    "priority": (("x-headgate-priority", _whole), ("x-vllm-priority", _lower_first)),
    "expected_tokens": (("x-headgate-expected-tokens", _whole),),
    "max_attempts": (("x-headgate-max-attempts", _whole),),
    "traceparent": (("traceparent", _text),),
}
"Each wish, and by which headers it is said; the first that is there counts."
