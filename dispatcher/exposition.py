"""The meter and the core's view, as Prometheus reads them. Names are fixed for good."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dispatcher.metrics import Meter
from scheduler.view import EndpointView, View


class Figures(Protocol):
    """What can be asked of a dispatcher at the moment of a scrape."""

    @property
    def is_leader(self) -> bool:
        """Whether this node leads."""

    @property
    def is_recording(self) -> bool | None:
        """Whether the journal is still written; None where none is kept."""

    @property
    def round_trips(self) -> int:
        """How often this reign asked Redis to move something."""

    def view(self) -> View | None:
        """The core's account; None for a standby."""


class Exposition(Collector):
    """The meter and the core's view, as Prometheus reads them."""

    def __init__(self, meter: Meter, figures: Figures, *, pool: str) -> None:
        """Every series bears the pool's name."""
        self._meter = meter
        self._figures = figures
        self._pool = pool

    def text(self) -> bytes:
        """All series, in Prometheus' text form."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """All series at this moment."""
        yield from self._counters()
        yield from self._histograms()
        yield self._gauge("is_leader", "Whether this node leads the pool.", self._figures.is_leader)
        view = self._figures.view()
        if view is not None:
            yield from self._core(view)
            yield from self._memory()
            if (is_recording := self._figures.is_recording) is not None:
                yield self._gauge("is_recording", "Whether the journal is written.", is_recording)
            yield from self._endpoints(view.endpoints)

    def _counters(self) -> Iterator[Metric]:
        meter = self._meter
        for name, help_, value in (
            ("requests", "Requests read.", meter.requests),
            ("unreadable_entries", "Entries that could not be read.", meter.unreadable),
            ("assignments", "Jobs handed over.", meter.assigned),
            ("returns", "Jobs that a worker handed back.", meter.returned),
            ("lease_expiries", "Jobs taken back from a silent endpoint.", meter.reclaimed),
            ("retries", "Attempts that must be made again.", meter.returned + meter.reclaimed),
            ("turns", "Turns of the loop.", meter.turns),
            ("reigns", "How often this node became leader.", meter.reigns),
            ("redis_round_trips", "Pipelines of moves.", self._figures.round_trips),
            (
                "best_cached_tokens",
                "Prefix tokens believed cached where most are.",
                meter.best_tokens,
            ),
            ("selected_cached_tokens", "Prefix tokens believed cached.", meter.selected_tokens),
            ("reused_cached_tokens", "Prefix tokens found cached.", meter.reused_tokens),
            ("prompt_tokens", "Prompt tokens of ended requests.", meter.prompt_tokens),
            ("output_tokens", "Output tokens of ended requests.", meter.output_tokens),
        ):
            yield self._family(CounterMetricFamily, name, help_, [], [((), value)])
        for name, help_, labels, counts in (
            ("outcomes", "Ended requests.", ["outcome", "by"], meter.outcomes),
            ("promises", "Promises by objective.", ["objective", "state"], meter.attained),
            ("forecasts", "Predicted first tokens.", ["quantile", "wait"], meter.forecasts),
            (
                "forecasts_covered",
                "Predicted first tokens that came no later than the quantile said.",
                ["quantile", "wait"],
                meter.covered,
            ),
        ):
            yield self._family(CounterMetricFamily, name, help_, labels, counts.items())
        refused = [((move,), count) for move, count in meter.refusals.items()]
        yield self._family(
            CounterMetricFamily, "refused_moves", "Duplicates and late moves.", ["move"], refused
        )

    def _histograms(self) -> Iterator[Metric]:
        meter = self._meter
        for name, help_, histogram in (
            ("ttft_seconds", "Enqueue to first token.", meter.ttft),
            ("tpot_seconds", "Mean time an output token after the first.", meter.tpot),
            ("e2e_seconds", "Enqueue to the end.", meter.e2e),
            ("decide_seconds", "The core's thinking in a turn.", meter.decide),
            ("plan_size", "Hand-overs in a turn that had any.", meter.plan),
        ):
            family = HistogramMetricFamily(f"headgate_{name}", help_, labels=["pool"])
            family.add_metric([self._pool], histogram.buckets(), histogram.sum)
            yield family
        family = HistogramMetricFamily(
            "headgate_slack_seconds", "Slack when decided.", labels=["pool", "stage"]
        )
        for stage, histogram in meter.slack.items():
            family.add_metric([self._pool, stage], histogram.buckets(), histogram.sum)
        yield family

    def _core(self, view: View) -> Iterator[Metric]:
        for name, help_, value in (
            ("waiting", "Requests that wait and can make it.", view.waiting),
            ("set_aside", "Requests that cannot make it as things stand.", view.set_aside),
            ("prefilled", "Requests between their two legs.", view.prefilled),
            ("assigned", "Requests handed over, not yet in an engine.", view.assigned),
            ("running", "Requests in an engine.", view.running),
            ("requests_at_risk", "Waiting, and due within the backlog.", view.at_risk),
            ("oldest_waiting_seconds", "Age of the oldest waiting.", view.oldest_age_s),
            ("backlog_seconds", "Predicted work that waits, over all ready.", view.backlog_s),
            ("learner_lag_seconds", "Age of the latest reward learned.", self._meter.learner_lag_s),
            ("active", "1 while anything waits or runs.", _is_active(view)),
        ):
            yield self._gauge(name, help_, value)

    def _memory(self) -> Iterator[Metric]:
        memory = self._meter.memory
        if memory is None:
            return
        for name, help_, value in (
            ("redis_memory_bytes", "Memory that Redis uses.", memory.used_bytes),
            ("redis_memory_max_bytes", "Its maxmemory; 0: none.", memory.max_bytes),
            ("redis_evicts", "1 where Redis may throw keys away.", memory.evicts),
        ):
            yield self._gauge(name, help_, value)

    def _endpoints(self, endpoints: Sequence[EndpointView]) -> Iterator[Metric]:
        for name, help_, field in (
            ("endpoint_seats", "Jobs it holds.", "seats"),
            ("endpoint_seats_max", "Jobs it can hold.", "seats_max"),
            ("endpoint_prefill_tokens", "Uncached tokens ahead of it.", "prefill_tokens"),
            ("endpoint_kv_tokens", "KV tokens handed over.", "kv_tokens"),
            ("endpoint_free_seconds", "Until it could begin something new.", "free_in_s"),
            ("endpoint_speed", "Times its hardware's declared time.", "speed"),
            ("endpoint_prediction_error", "Mean absolute log error.", "error"),
            ("endpoint_prediction_coverage", "Share within the 90 % bound.", "coverage"),
        ):
            rows = [((endpoint.name,), getattr(endpoint, field)) for endpoint in endpoints]
            yield self._family(GaugeMetricFamily, name, help_, ["endpoint"], rows)
        prior = [((endpoint.name,), endpoint.believed == "prior") for endpoint in endpoints]
        yield self._family(
            GaugeMetricFamily,
            "endpoint_on_prior",
            "1 where plans go by its declared hardware, as what was learned was worse.",
            ["endpoint"],
            prior,
        )
        switches = [((endpoint.name,), endpoint.switches) for endpoint in endpoints]
        yield self._family(
            CounterMetricFamily,
            "endpoint_guard_switches",
            "Changes between what was learned and what is declared.",
            ["endpoint"],
            switches,
        )
        states = [((endpoint.name, endpoint.state), 1.0) for endpoint in endpoints]
        yield self._family(
            GaugeMetricFamily, "endpoint_state", "1 for its state.", ["endpoint", "state"], states
        )

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        return self._family(GaugeMetricFamily, name, help_, [], [((), value)])

    def _family(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        help_: str,
        labels: Sequence[str],
        rows: Iterable[tuple[Sequence[str], float]],
    ) -> Metric:
        family = kind(f"headgate_{name}", help_, labels=["pool", *labels])
        for values, value in rows:
            family.add_metric([self._pool, *values], float(value))
        return family


def _is_active(view: View) -> bool:
    return bool(view.waiting or view.set_aside or view.prefilled or view.assigned or view.running)
