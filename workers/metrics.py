"""A worker's Prometheus metrics and the small server that shows them. Base units; vLLM's names where it has one."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TypedDict

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from scheduler.steptime import StepTime
from scheduler.wire.worker import Result

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80, 160)
GAP_BUCKETS = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.12,
    0.2,
    0.4,
    0.8,
    2.0,
    5.0,
)
E2E_BUCKETS = (0.1, 0.3, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300, 600, 1800, 3600)

HOST = "0.0.0.0"  # noqa: S104  scraped from other machines; it shows nothing secret


class _Options(TypedDict):
    registry: CollectorRegistry
    labelnames: tuple[str, ...]


class Gaps:
    """A histogram filled once a token: a plain list, since Prometheus' own costs ten times as much."""

    def __init__(self) -> None:
        self._counts = [0] * (len(GAP_BUCKETS) + 1)
        self._sum = 0.0

    def add(self, gap_s: float) -> None:
        self._counts[bisect_left(GAP_BUCKETS, gap_s)] += 1
        self._sum += gap_s

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum."""
        total, rows = 0, []
        for bound, count in zip([*map(str, GAP_BUCKETS), "+Inf"], self._counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows, self._sum


class Meter:
    """All of a process' metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gaps: dict[str, Gaps] = {}
        one: _Options = {"registry": self.registry, "labelnames": ("endpoint",)}
        self.held = Gauge("headgate_worker_jobs_held", "Jobs not yet in the engine.", **one)
        self.running = Gauge("headgate_worker_jobs_running", "Jobs in the engine.", **one)
        self.is_ready = Gauge(
            "headgate_worker_engine_ready", "1 while the engine takes work.", **one
        )
        self.returned = Counter("headgate_worker_returned", "Attempts handed back.", **one)
        self.prefilled = Counter(
            "headgate_worker_prefilled", "Prefill legs that did their part.", **one
        )
        self.retries = Counter("headgate_worker_retries", "Attempts after the first.", **one)
        self.overruns = Counter(
            "headgate_worker_overruns", "Answers cut whose engine went on past max_tokens.", **one
        )
        self.prompt_tokens = Counter("headgate_worker_prompt_tokens", "As engines count.", **one)
        self.cached_tokens = Counter(
            "headgate_worker_prompt_tokens_cached", "Of these, from the prefix cache.", **one
        )
        self.output_tokens = Counter(
            "headgate_worker_generation_tokens", "As engines count.", **one
        )
        self.outcomes = Counter(
            "headgate_worker_outcomes",
            "Terminal records written.",
            registry=self.registry,
            labelnames=("endpoint", "outcome"),
        )
        self.fenced = Counter(
            "headgate_worker_fenced", "Moves refused: a newer lease exists.", registry=self.registry
        )
        self.ttft = Histogram(
            "headgate_worker_time_to_first_token_seconds",
            "From the enqueue.",
            buckets=TTFT_BUCKETS,
            **one,
        )
        self.e2e = Histogram(
            "headgate_worker_e2e_request_latency_seconds",
            "From the enqueue.",
            buckets=E2E_BUCKETS,
            **one,
        )
        self._law = Gauge(
            "headgate_worker_step_seconds",
            "The step-time law: seconds a step and per unit of each term.",
            registry=self.registry,
            labelnames=("endpoint", "term"),
        )
        self._law_error = Gauge(
            "headgate_worker_step_error_ratio", "Of the law, recent mean.", **one
        )
        self.registry.register(_GapCollector(self.gaps))

    def ended(self, result: Result) -> None:
        """Count a terminal record."""
        endpoint = result.endpoint
        self.outcomes.labels(endpoint, result.outcome).inc()
        if result.ttft_s is not None:
            self.ttft.labels(endpoint).observe(result.ttft_s)
        if result.finished_at is not None and result.enqueued_at is not None:
            self.e2e.labels(endpoint).observe(max(0.0, result.finished_at - result.enqueued_at))
        self.prompt_tokens.labels(endpoint).inc(result.prompt_tokens)
        self.cached_tokens.labels(endpoint).inc(result.cached_tokens)
        self.output_tokens.labels(endpoint).inc(result.output_tokens)

    def step_law(self, endpoint: str, step_time: StepTime) -> None:
        """Show the law as it stands."""
        law = step_time.law
        for term in ("base", "sequence", "kv", "prefill"):
            self._law.labels(endpoint, term).set(getattr(law, f"{term}_s"))
        self._law_error.labels(endpoint).set(step_time.error)


class _GapCollector:
    def __init__(self, gaps: dict[str, Gaps]) -> None:
        self._gaps = gaps

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "headgate_worker_inter_token_latency_seconds",
            "Between two arrivals of one request.",
            labels=["endpoint"],
        )
        for endpoint, gaps in self._gaps.items():
            buckets, total = gaps.buckets()
            family.add_metric([endpoint], buckets, sum_value=total)
        yield family


async def serve(
    meter: Meter, port: int, *, is_ready: Callable[[], bool], refresh: Callable[[], None]
) -> web.AppRunner:
    """Serve /metrics, /healthz and /readyz; the caller cleans the runner up."""

    async def metrics(_: web.Request) -> web.Response:
        refresh()
        body = generate_latest(meter.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        ready = is_ready()
        return web.Response(
            text="ready\n" if ready else "not ready\n", status=200 if ready else 503
        )

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, port).start()
    return runner
