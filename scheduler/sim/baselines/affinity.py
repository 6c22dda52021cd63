"""Routers that weigh a cached prefix against load by thresholds or fixed weights."""

from collections.abc import Sequence

import numpy as np

from scheduler import cost
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.load import least
from scheduler.sim.baselines.senses import Account, Asked, Prefixes, Scrapes


def aibrix(
    requests: Sequence[float],
    matched: Sequence[float],
    slots: Sequence[int],
    *,
    imbalance: int,
    sigmas: float,
    rng: np.random.Generator,
) -> int:
    """AIBrix, pkg/plugins/gateway/algorithms/prefix_cache.go (Aug 2026).

    Is the spread of requests in flight over `imbalance`, only the least loaded are looked at. Of those looked at
    that match at all, best match first and fewer requests first, the first with at most mean + `sigmas` standard
    deviations of requests; without one, the least loaded.

    >>> aibrix([5, 1, 4], [0.9, 0.0, 0.5], [0, 1, 2], imbalance=8, sigmas=1.0, rng=np.random.default_rng(0))
    0
    """
    counts = [requests[slot] for slot in slots]
    looked_at = slots
    if max(counts) - min(counts) > imbalance:
        looked_at = [slot for slot in slots if requests[slot] == min(counts)]
    limit = float(np.mean(counts) + sigmas * np.std(counts))
    candidates = [slot for slot in looked_at if matched[slot] > 0]
    for slot in sorted(candidates, key=lambda at: (-matched[at], requests[at])):
        if requests[slot] <= limit:
            return slot
    return least(requests, slots, rng)


class Aibrix:
    """AIBrix `prefix-cache`, with its own prefix table and its own count of requests."""

    def __init__(
        self,
        account: Account,
        prefixes: Prefixes,
        *,
        imbalance: int,
        sigmas: float,
        rng: np.random.Generator,
    ) -> None:
        self._account, self._prefixes, self._rng = account, prefixes, rng
        self._imbalance, self._sigmas = imbalance, sigmas

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        # The real one counts in whole per cent of the prompt.
        share = [100 * cached // asked.prompt_tokens for cached in self._prefixes.match(asked)]
        return aibrix(
            self._account.requests(),
            share,
            slots,
            imbalance=self._imbalance,
            sigmas=self._sigmas,
            rng=self._rng,
        )


def sglang(
    requests: Sequence[float],
    share: Sequence[float],
    slots: Sequence[int],
    *,
    threshold: float,
    absolute: float,
    relative: float,
    rng: np.random.Generator,
) -> int:
    """SGLang's router, `cache_aware` (sglang-router 0.3).

    Out of balance (max - min > `absolute` and max > `relative` * min): the fewest requests. Else the best match if
    it is more than `threshold` of the prompt, else the fewest requests.

    >>> sglang([70, 1], [1.0, 0.0], [0, 1], threshold=0.3, absolute=64, relative=1.5, rng=np.random.default_rng(0))
    1
    """
    counts = [requests[slot] for slot in slots]
    if max(counts) - min(counts) > absolute and max(counts) > relative * min(counts):
        return least(requests, slots, rng)
    best = max(share[slot] for slot in slots)
    if best > threshold:
        return least(requests, [slot for slot in slots if share[slot] == best], rng)
    return least(requests, slots, rng)


class Sglang:
    """SGLang `cache_aware`, with its own tree and its own count of requests."""

    def __init__(
        self,
        account: Account,
        prefixes: Prefixes,
        *,
        threshold: float,
        absolute: float,
        relative: float,
        rng: np.random.Generator,
    ) -> None:
        self._account, self._prefixes, self._rng = account, prefixes, rng
        self._threshold, self._absolute, self._relative = threshold, absolute, relative

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        share = [cached / asked.prompt_tokens for cached in self._prefixes.match(asked)]
        return sglang(
            self._account.requests(),
            share,
            slots,
            threshold=self._threshold,
            absolute=self._absolute,
            relative=self._relative,
            rng=self._rng,
        )


def weighted(
    waiting: Sequence[float],
    kv_usage: Sequence[float],
    share: Sequence[float],
    slots: Sequence[int],
    weights: tuple[float, float, float],
) -> list[float]:
    """llm-d's scorers: queue (min-max, short is 1), KV (free part), prefix (matched part), weighted and summed.

    >>> weighted([0, 4], [0.5, 0.0], [0.0, 1.0], [0, 1], (2.0, 2.0, 3.0))
    [3.0, 5.0]
    """
    seen = [waiting[slot] for slot in slots]
    low, high = min(seen), max(seen)
    by_queue, by_kv, by_prefix = weights
    return [
        by_queue * (1.0 if high == low else (high - waiting[slot]) / (high - low))
        + by_kv * (1.0 - kv_usage[slot])
        + by_prefix * share[slot]
        for slot in slots
    ]


class LlmdWeighted:
    """llm-d's default profile: scraped queue and KV, its own prefix table, the highest sum."""

    def __init__(
        self,
        scrapes: Scrapes,
        prefixes: Prefixes,
        *,
        weights: tuple[float, float, float],
        rng: np.random.Generator,
    ) -> None:
        self._scrapes, self._prefixes, self._rng = scrapes, prefixes, rng
        self._weights = weights

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        share = [cached / asked.prompt_tokens for cached in self._prefixes.match(asked)]
        scores = weighted(
            self._scrapes.waiting(), self._scrapes.kv_usage(), share, slots, self._weights
        )
        losses = [-score for score in scores]
        return slots[least(losses, range(len(slots)), self._rng)]


def sticky(
    in_flight: Sequence[float],
    cached: Sequence[float],
    slots: Sequence[int],
    *,
    prompt_tokens: int,
    affinity: float,
    lead_tokens: Sequence[float],
) -> int:
    """llm-d's sticky-until-saturated.

    Among those that hold at least `affinity` of the prompt and whose uncached tokens in flight lead the least
    loaded by no more than `lead_tokens` (peak rate times the longest wait), else among all: the least tokens in
    flight and own uncached ones together.

    >>> sticky([900, 0], [80, 0], [0, 1], prompt_tokens=100, affinity=0.8, lead_tokens=[1000, 1000])
    0
    >>> sticky([1100, 0], [80, 0], [0, 1], prompt_tokens=100, affinity=0.8, lead_tokens=[1000, 1000])
    1
    """
    coldest = min(in_flight[slot] for slot in slots)
    warm = [
        slot
        for slot in slots
        if cached[slot] >= affinity * prompt_tokens
        and in_flight[slot] - coldest <= lead_tokens[slot]
    ]
    return min(warm or slots, key=lambda at: (in_flight[at] + prompt_tokens - cached[at], at))


class LlmdSticky:
    """llm-d's sticky-until-saturated, on its own book."""

    def __init__(self, desk: Desk, *, affinity: float, wait_s: float) -> None:
        self._account, self._prefixes, self._beats = desk.account, desk.prefixes, desk.beats
        self._affinity, self._wait_s = affinity, wait_s

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        peaks = [self._wait_s / cost.hardware(beat.hardware).token_s for beat in self._beats]
        return sticky(
            self._account.prefill_tokens(),
            self._prefixes.match(asked),
            slots,
            prompt_tokens=asked.prompt_tokens,
            affinity=self._affinity,
            lead_tokens=peaks,
        )
