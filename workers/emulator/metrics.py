"""The emulated `/metrics`: vLLM's names over the engine's counters.

Written by hand, not with a client library: one step of 256 sequences is one observation
with a weight here, and would be 256 locked calls there.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from scheduler.sim.engine import Engine
from scheduler.sim.sequence import Sequence
from scheduler.sim.step import Step

# vLLM's own buckets (vllm/v1/metrics/loggers.py).
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0,
    20000.0, 50000.0, 100000.0,
)  # fmt: skip

REASONS = ("stop", "length", "abort", "error", "repetition")


class Histogram:
    """Counts by bucket; an observation may stand for many equal ones."""

    __slots__ = ("_bounds", "_counts", "count", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.count += times
        self.sum += value * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
        yield f"{name}_count{{{labels}}} {self.count}"
        yield f"{name}_sum{{{labels}}} {self.sum}"


class Metrics:
    """Everything `/metrics` shows that the engine does not count itself."""

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.tpot = Histogram(ITL_BUCKETS)
        self.e2e = Histogram(REQUEST_BUCKETS)
        self.queue = Histogram(REQUEST_BUCKETS)
        self.prefill = Histogram(REQUEST_BUCKETS)
        self.decode = Histogram(REQUEST_BUCKETS)
        self.inference = Histogram(REQUEST_BUCKETS)
        self.step_tokens = Histogram(TOKEN_BUCKETS)
        self.prompt_tokens = Histogram(TOKEN_BUCKETS)
        self.output_tokens = Histogram(TOKEN_BUCKETS)
        self.computed_tokens = Histogram(TOKEN_BUCKETS)
        self.finished = dict.fromkeys(REASONS, 0)
        self.rejected = {"max_num_queued_reqs": 0, "max_num_queued_tokens": 0}
        self._last_step_at = 0.0

    def note_step(self, step: Step) -> None:
        """Tokens of a finished step; the gap is the same for all who decoded in it."""
        self.step_tokens.observe(step.new_tokens)
        if step.decoded:
            self.itl.observe(step.ended_at - self._last_step_at, len(step.decoded))
        self._last_step_at = step.ended_at

    def note_first_token(self, sequence: Sequence, received_at: float) -> None:
        assert sequence.first_token_at is not None
        self.ttft.observe(sequence.first_token_at - received_at)

    def note_finished(self, sequence: Sequence, received_at: float) -> None:
        """A sequence that ended by itself, with all its times."""
        assert sequence.scheduled_at is not None
        assert sequence.first_token_at is not None
        assert sequence.finished_at is not None
        self.finished[sequence.finish_reason] += 1
        decode_s = sequence.finished_at - sequence.first_token_at
        self.queue.observe(sequence.scheduled_at - sequence.arrived_at)
        self.prefill.observe(sequence.first_token_at - sequence.scheduled_at)
        self.decode.observe(decode_s)
        self.inference.observe(sequence.finished_at - sequence.scheduled_at)
        self.e2e.observe(sequence.finished_at - received_at)
        self.prompt_tokens.observe(sequence.prompt_tokens)
        self.output_tokens.observe(sequence.output_tokens)
        self.computed_tokens.observe(sequence.prompt_tokens - sequence.cached_tokens)
        if sequence.output_tokens > 1:
            self.tpot.observe(decode_s / (sequence.output_tokens - 1))

    def render(self, engine: Engine, *, model: str, sleep_level: int | None) -> str:
        labels = f'engine="0",model_name="{model}"'
        lines: list[str] = []
        for name, values in self._gauges(engine, sleep_level).items():
            lines += _family(name, "gauge", values, labels)
        for name, values in self._counters(engine).items():
            lines += _family(name, "counter", values, labels)
        # The API server counts these, which knows of no engine's number.
        refused = [(f'reason="{reason}"', n) for reason, n in self.rejected.items()]
        lines += _family("admission_rejections", "counter", refused, f'model_name="{model}"')
        for name, histogram in self._histograms().items():
            lines.append(f"# TYPE vllm:{name} histogram")
            lines += histogram.lines(f"vllm:{name}", labels)
        return "\n".join(lines) + "\n"

    def _gauges(
        self, engine: Engine, sleep_level: int | None
    ) -> dict[str, list[tuple[str, float]]]:
        return {
            "num_requests_running": [("", engine.n_running)],
            "num_requests_waiting": [("", engine.n_waiting)],
            "num_requests_waiting_by_reason": [
                ('reason="capacity"', engine.n_waiting),
                ('reason="deferred"', 0),
            ],
            "kv_cache_usage_perc": [("", engine.kv_usage)],
            "engine_sleep_state": [
                ('sleep_state="awake"', int(sleep_level is None)),
                ('sleep_state="weights_offloaded"', int(sleep_level == 1)),
                ('sleep_state="discard_all"', int(sleep_level == 2)),
            ],
            "cache_config_info": [(_cache_config(engine), 1)],
        }

    def _counters(self, engine: Engine) -> dict[str, list[tuple[str, float]]]:
        count = engine.counters
        computed = count.prompt_tokens - count.prefix_hits
        return {
            "prefix_cache_queries": [("", count.prefix_queries)],
            "prefix_cache_hits": [("", count.prefix_hits)],
            "external_prefix_cache_queries": [("", 0)],
            "external_prefix_cache_hits": [("", 0)],
            "num_preemptions": [("", count.preemptions)],
            "prompt_tokens": [("", count.prompt_tokens)],
            "prompt_tokens_cached": [("", count.prefix_hits)],
            "prompt_tokens_cached_by_source": [
                (f'source="{source}"', count.prefix_hits if source == "device" else 0)
                for source in ("device", "host", "p2p", "disk", "external_unspecified")
            ],
            "prompt_tokens_by_source": [
                ('source="local_compute"', computed),
                ('source="local_cache_hit"', count.prefix_hits),
                ('source="external_kv_transfer"', 0),
            ],
            "generation_tokens": [("", count.generation_tokens)],
            "request_success": [
                (f'finished_reason="{reason}"', n) for reason, n in self.finished.items()
            ],
        }

    def _histograms(self) -> dict[str, Histogram]:
        return {
            "time_to_first_token_seconds": self.ttft,
            "inter_token_latency_seconds": self.itl,
            "request_time_per_output_token_seconds": self.tpot,
            "e2e_request_latency_seconds": self.e2e,
            "request_queue_time_seconds": self.queue,
            "request_prefill_time_seconds": self.prefill,
            "request_decode_time_seconds": self.decode,
            "request_inference_time_seconds": self.inference,
            "iteration_tokens_total": self.step_tokens,
            "request_prompt_tokens": self.prompt_tokens,
            "request_generation_tokens": self.output_tokens,
            "request_prefill_kv_computed_tokens": self.computed_tokens,
        }


def _cache_config(engine: Engine) -> str:
    values = {
        "block_size": engine.settings.block_size,
        "num_gpu_blocks": engine.kv.capacity,
        "kv_cache_size_tokens": engine.kv_tokens,
        "enable_prefix_caching": engine.settings.prefix_caching,
    }
    return ",".join(f'{name}="{value}"' for name, value in values.items())


def _family(
    name: str, kind: str, values: Iterable[tuple[str, float]], labels: str
) -> Iterator[str]:
    suffix = "_total" if kind == "counter" else ""
    yield f"# TYPE vllm:{name}{suffix} {kind}"
    for extra, value in values:
        both = f"{labels},{extra}" if extra else labels
        yield f"vllm:{name}{suffix}{{{both}}} {float(value)}"
