"""What a dispatcher counts, and how Prometheus reads it.

The loop counts in plain numbers; nothing is formatted before somebody asks. Names are fixed for good.
"""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from scheduler import forecast, spread
from scheduler.events import Arrived, Assign, Command, Event, Finish, Note, Reclaim, Recovered
from scheduler.view import EndpointView, View
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Reward

TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
"From an idle small engine's first token to a queue of minutes."

TPOT_S = (
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
)
"From a small model alone to a batch that thrashes."

E2E_S = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600, 1800)
"From a short answer to a batch job's."

SLACK_S = (-60, -30, -10, -5, -2, -1, -0.5, -0.2, 0, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
"Both sides of zero, finest around it."

DECIDE_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
"A turn's thinking; 1 ms is the aim."

PLAN_SIZE = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"Hand-overs in one turn."

REMEMBERED_MAX = 200_000
"Living requests whose named objective is remembered; beyond that the oldest count as unnamed."


class Histogram:
    """Counts by bucket, and the sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the buckets' upper edges, rising."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper edge and how many lie at or below it, as Prometheus wants them."""
        total, found = 0, []
        edges = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        for edge, count in zip(edges, self._counts, strict=True):
            total += count
            found.append((edge, float(total)))
        return found

    @property
    def sum(self) -> float:
        """Of all values."""
        return self._sum


class Memory(msgspec.Struct, frozen=True):
    """What Redis said of its memory, at most one round of upkeep ago."""

    used_bytes: int
    max_bytes: int
    "0: no limit but the machine's."
    evicts: bool
    "True: its policy lets it throw keys away, and a key may be a request."


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


class Meter:
    """Counts of one process, over all its reigns."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        "By outcome and by who said so: `worker` or `dispatcher`."
        self.attained: Counter[tuple[str, str]] = Counter()
        "By objective and whether the promise was kept."
        self.refusals: Counter[str] = Counter()
        "By the move that Redis refused."
        self.requests = 0
        self.unreadable = 0
        self.assigned = 0
        self.returned = 0
        self.reclaimed = 0
        self.turns = 0
        self.reigns = 0
        self.learner_lag_s = 0.0
        self.memory: Memory | None = None
        "Of Redis; None before it was asked."
        self.best_tokens = 0
        self.selected_tokens = 0
        self.reused_tokens = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.forecasts: Counter[tuple[str, str]] = Counter()
        "First tokens that had been predicted, by quantile and by the predicted wait."
        self.covered: Counter[tuple[str, str]] = Counter()
        "Of these, those that came no later than the quantile said."
        self.turned_at = time.monotonic()
        "When the loop last turned, or said that it waits for Redis."
        self.ttft = Histogram(TTFT_S)
        self.tpot = Histogram(TPOT_S)
        self.e2e = Histogram(E2E_S)
        self.decide = Histogram(DECIDE_S)
        self.plan = Histogram(PLAN_SIZE)
        self.slack: dict[str, Histogram] = defaultdict(lambda: Histogram(SLACK_S))
        self._objectives: dict[str, str] = {}

    def beat(self) -> None:
        """The loop lives."""
        self.turned_at = time.monotonic()

    def turned(self, took_s: float) -> None:
        """The loop has turned, and the core thought for so long."""
        self.decide.add(took_s)
        self.turns += 1
        self.beat()

    def event(self, event: Event, now: float) -> None:
        """Count a fact on its way to the core."""
        match event:
            case Arrived():
                self.requests += 1
                self._remember(event)
            case Recovered():
                self._remember(event)
            case Reward():
                self._reward(event, now)
            case _:
                pass

    def commands(self, commands: Sequence[Command]) -> None:
        """Count what was decided."""
        assigned = 0
        for command in commands:
            match command:
                case Assign():
                    assigned += 1
                    self.best_tokens += command.decision.best_cached_tokens
                    self.selected_tokens += command.decision.cached_tokens
                    self._decided(command.decision)
                case Note():
                    self._decided(command.decision)
                case Reclaim():
                    self.reclaimed += 1
                case Finish():
                    self.outcomes[command.result.outcome, "dispatcher"] += 1
                    self._end(command.result.id, is_kept=False)
                case _:
                    pass
        self.assigned += assigned
        if assigned:
            self.plan.add(assigned)

    def _decided(self, decision: Decision) -> None:
        if decision.slack_s is not None:
            self.slack[decision.kind].add(decision.slack_s)

    def _reward(self, reward: Reward, now: float) -> None:
        if reward.finished_at is not None:
            self.learner_lag_s = max(0.0, now - reward.finished_at)
        self._judge(reward)
        if reward.outcome == "returned":
            self.returned += 1
            return
        if reward.outcome == "prefilled":
            return  # half a request ends nothing
        self.outcomes[reward.outcome, "worker"] += 1
        self._end(reward.id, is_kept=reward.on_time)
        self.reused_tokens += reward.cached_tokens or 0
        self.prompt_tokens += reward.prompt_tokens
        self.output_tokens += reward.output_tokens
        if reward.ttft_s is not None:
            self.ttft.add(reward.ttft_s)
        if reward.tpot_s is not None:
            self.tpot.add(reward.tpot_s)
        if reward.finished_at is not None and reward.enqueued_at is not None:
            self.e2e.add(reward.finished_at - reward.enqueued_at)

    def _judge(self, reward: Reward) -> None:
        """Hold what was said when the request was handed over against what came of it."""
        seen = forecast.read(reward)
        if seen is None:
            return
        band = spread.band(seen.start_s)
        for part, is_covered in zip(forecast.PARTS, seen.covered, strict=False):
            self.forecasts[f"{part:g}", band] += 1
            self.covered[f"{part:g}", band] += is_covered

    def _remember(self, event: Arrived | Recovered) -> None:
        if not event.request.objective:
            return
        self._objectives[event.request.id] = event.request.objective
        if len(self._objectives) > REMEMBERED_MAX:
            del self._objectives[next(iter(self._objectives))]

    def _end(self, request_id: str, *, is_kept: bool | None) -> None:
        objective = self._objectives.pop(request_id, "")
        if is_kept is not None:
            self.attained[objective, "kept" if is_kept else "missed"] += 1


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
