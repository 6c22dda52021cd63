"""Routers that put a figure on each endpoint and take the smallest: tokens, blocks or predicted seconds."""

from collections.abc import Callable, Sequence

import numpy as np

from scheduler import cost
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.load import least
from scheduler.sim.baselines.senses import Account, Asked, Costs, Prefixes

DYNAMO_BLOCK = 16
"Tokens of a block in Dynamo's cost; any other would scale both terms alike."


def lmetric(
    in_flight: Sequence[float], requests: Sequence[float], own: Sequence[float]
) -> list[float]:
    """LMetric: (uncached tokens queued + own uncached) x (batch + 1), per slot.

    >>> lmetric([100.0, 0.0], [0, 3], [50.0, 60.0])
    [150.0, 240.0]
    """
    return [
        (queued + mine) * (batch + 1)
        for queued, mine, batch in zip(in_flight, own, requests, strict=True)
    ]


def dynamo(
    in_flight: Sequence[float],
    kv_tokens: Sequence[float],
    own: Sequence[float],
    *,
    prompt_tokens: int,
    overlap_weight: float,
) -> list[float]:
    """Dynamo's KV router, lib/kv-router selector: weight x prefill blocks + decode blocks, both with the newcomer.

    >>> dynamo([160.0], [320.0], [32.0], prompt_tokens=64, overlap_weight=1.0)
    [36.0]
    """
    return [
        (overlap_weight * (queued + mine) + held + prompt_tokens) / DYNAMO_BLOCK
        for queued, held, mine in zip(in_flight, kv_tokens, own, strict=True)
    ]


class Lmetric:
    """LMetric, on its own book."""

    def __init__(self, account: Account, prefixes: Prefixes, rng: np.random.Generator) -> None:
        self._account, self._prefixes, self._rng = account, prefixes, rng

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        own = [asked.prompt_tokens - cached for cached in self._prefixes.match(asked)]
        scores = lmetric(self._account.prefill_tokens(), self._account.requests(), own)
        return least(scores, slots, self._rng)


class Dynamo:
    """Dynamo's KV router at temperature 0."""

    def __init__(
        self,
        account: Account,
        prefixes: Prefixes,
        *,
        overlap_weight: float,
        rng: np.random.Generator,
    ) -> None:
        self._account, self._prefixes, self._rng = account, prefixes, rng
        self._overlap_weight = overlap_weight

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        own = [asked.prompt_tokens - cached for cached in self._prefixes.match(asked)]
        scores = dynamo(
            self._account.prefill_tokens(),
            self._account.kv_tokens(),
            own,
            prompt_tokens=asked.prompt_tokens,
            overlap_weight=self._overlap_weight,
        )
        return least(scores, slots, self._rng)


class EarliestFinish:
    """The earliest predicted first token, by the cost model that ships: greedy, nothing else."""

    def __init__(self, costs: Costs, prefixes: Prefixes) -> None:
        self._costs, self._prefixes = costs, prefixes

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:
        cached = self._prefixes.match(asked)
        total_s = self._costs.backlog_s(now) + self._costs.service_s(asked, cached)
        return min(slots, key=lambda at: (float(total_s[at]), at))


class LlmdPredicted:
    """llm-d's predicted-latency profile: endpoints with most of the prompt cached, if any; then greedy.

    The real one predicts by XGBoost, retrained each second on recent answers; here by the cost model that ships,
    which is more accurate at every age measured.
    """

    def __init__(self, costs: Costs, prefixes: Prefixes, *, gate: float) -> None:
        self._costs, self._prefixes, self._gate = costs, prefixes, gate

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:
        cached = self._prefixes.match(asked)
        warm = [slot for slot in slots if cached[slot] >= self._gate * asked.prompt_tokens]
        total_s = self._costs.backlog_s(now) + self._costs.service_s(asked, cached)
        return min(warm or slots, key=lambda at: (float(total_s[at]), at))


class Mooncake:
    """Mooncake's Algorithm 1 without its cache transfer: earliest first token by an offline fit, or refused.

    The fit is the data sheet's; queues are sums of its estimates for what was sent and not answered.
    """

    def __init__(self, desk: Desk) -> None:
        self._beats, self._prefixes, self._ledger = desk.beats, desk.prefixes, desk.ledger

    def choose(self, asked: Asked, slots: list[int], now: float) -> int | None:
        cached = self._prefixes.match(asked)
        total_s = {slot: self._total_s(slot, asked, cached[slot]) for slot in slots}
        best = min(slots, key=lambda at: (total_s[at], at))
        return best if now + total_s[best] <= asked.due_at else None

    def _total_s(self, slot: int, asked: Asked, cached: int) -> float:
        rated = cost.hardware(self._beats[slot].hardware)
        tokens = float(asked.prompt_tokens - cached)
        pairs = cost.pairs(tokens, asked.prompt_tokens)
        queued_s = (
            float(self._ledger.tokens[slot]) * rated.token_s
            + float(self._ledger.pairs[slot]) * rated.attention_s
        )
        own_s = rated.overhead_s + tokens * rated.token_s + pairs * rated.attention_s
        return queued_s + own_s


Truth = Callable[[str, str], float]
"True seconds to a request's first token on an endpoint, both by name, were it sent there now."


class Oracle:
    """Greedy on the truth: real coefficients, real caches, real queues. Still myopic, so no bound."""

    def __init__(self, names: Sequence[str], truth: Truth) -> None:
        self._names, self._truth = names, truth

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        return min(slots, key=lambda at: (self._truth(asked.id, self._names[at]), at))
