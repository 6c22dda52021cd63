"""What an engine's /metrics tell of its load and capacity. Whatever is absent stays unknown."""

import math
import re
from itertools import islice

import msgspec

_WANTED = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc"
    rb"|engine_sleep_state|cache_config_info|prefix_cache_queries(?:_total)?|prefix_cache_hits(?:_total)?)"
    rb"(\{[^\n]{0,4096}\})? ([0-9.eE+-]+|NaN)$",
    re.MULTILINE,
)
"Only these lines are looked at: parsing all of a 50 KB page would cost 10 ms a second and engine."

_LABEL = re.compile(rb'\b(\w++)="([^"]*)"')
"A name is tried once, from its beginning: from each of its letters, a long one would hold the process for hours."

LINES_MAX = 4096
"So many of them are read; an engine has ten."

MOST = 2**53
"No count of anything is greater; beyond it a float counts no ones."


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One reading. Information for people and for the capacity, never the control signal."""

    running: int = 0
    queued: int = 0
    kv_usage: float = 0.0
    block_tokens: int = 0
    kv_tokens: int = 0
    no_prefix_cache: bool = False
    is_asleep: bool = False
    prefix_queries: float = 0.0
    prefix_hits: float = 0.0


def parse(page: bytes) -> Load:
    r"""The reading on this page; several engines behind one server are added up.

    >>> parse(b'vllm:num_requests_running{model_name="m"} 3.0\nvllm:num_requests_waiting 1\n').running
    3
    """
    sums: dict[bytes, float] = {}
    counts: dict[bytes, int] = {}
    blocks = size = tokens = 0
    is_asleep = no_prefix_cache = False
    found = _WANTED.finditer(page.replace(b"\r", b""))
    for name, labels, value in (one.groups(b"") for one in islice(found, LINES_MAX)):
        if name == b"cache_config_info":
            config = dict(_LABEL.findall(labels))
            blocks += _whole(config.get(b"num_gpu_blocks"))
            size = max(size, _whole(config.get(b"block_size")))
            tokens += _whole(config.get(b"kv_cache_size_tokens"))
            no_prefix_cache |= config.get(b"enable_prefix_caching") == b"False"
        elif name == b"engine_sleep_state":
            is_awake = dict(_LABEL.findall(labels)).get(b"sleep_state") == b"awake"
            is_asleep = is_asleep or (is_awake and _number(value) == 0.0)
        else:
            sums[name] = min(sums.get(name, 0.0) + _number(value), MOST)
            counts[name] = counts.get(name, 0) + 1
    usage = b"kv_cache_usage_perc" if b"kv_cache_usage_perc" in sums else b"gpu_cache_usage_perc"
    return Load(
        running=int(sums.get(b"num_requests_running", 0)),
        queued=int(sums.get(b"num_requests_waiting", 0)),
        kv_usage=min(sums.get(usage, 0.0) / counts.get(usage, 1), 1.0),
        block_tokens=size,
        kv_tokens=min(tokens or blocks * size, MOST),
        no_prefix_cache=no_prefix_cache,
        is_asleep=is_asleep,
        prefix_queries=_either(sums, b"prefix_cache_queries"),
        prefix_hits=_either(sums, b"prefix_cache_hits"),
    )


def _either(sums: dict[bytes, float], name: bytes) -> float:
    return sums.get(name + b"_total", sums.get(name, 0.0))


def _number(text: bytes) -> float:
    try:
        found = float(text)
    except ValueError:
        return 0.0
    return min(max(found, 0.0), MOST) if math.isfinite(found) else 0.0


def _whole(text: bytes | None) -> int:
    try:
        return min(max(int(text or 0), 0), MOST)
    except ValueError:
        return 0  # vLLM writes "None" where it does not know yet
