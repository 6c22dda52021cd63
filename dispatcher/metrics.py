"""What a dispatcher counts; `exposition` is how Prometheus reads it.

The loop counts in plain numbers; nothing is formatted before somebody asks.
"""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence

import msgspec

from scheduler import forecast, spread
from scheduler.events import Arrived, Assign, Command, Event, Finish, Note, Reclaim, Recovered
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

PARTS = tuple(f"{part:g}" for part in forecast.PARTS)
"The quantiles that are said of every first token."

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
        if reward.leg != "decode":  # to which all that it fetched may be cached
            self.reused_tokens += reward.cached_tokens or 0
        if reward.outcome == "prefilled":
            return  # half a request ends nothing
        self.outcomes[reward.outcome, "worker"] += 1
        self._end(reward.id, is_kept=reward.on_time)
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
        for part, is_covered in zip(PARTS, seen.covered, strict=False):
            self.forecasts[part, band] += 1
            self.covered[part, band] += is_covered

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
