"""Routers that look at load only, each by its one formula."""

from collections.abc import Sequence

import numpy as np

from scheduler.sim.baselines.senses import Account, Asked


def least(values: Sequence[float], slots: Sequence[int], rng: np.random.Generator) -> int:
    """One of the slots with the smallest value; chance decides between equals.

    >>> least([3.0, 1.0, 2.0], [0, 2], np.random.default_rng(0))
    2
    """
    smallest = min(values[slot] for slot in slots)
    equals = [slot for slot in slots if values[slot] == smallest]
    return equals[0] if len(equals) == 1 else equals[int(rng.random() * len(equals))]


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turns = 0

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        self._turns += 1
        return slots[(self._turns - 1) % len(slots)]


class Random:
    """Anybody."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        return slots[int(self._rng.random() * len(slots))]


class LeastRequest:
    """The fewest requests in flight."""

    def __init__(self, account: Account, rng: np.random.Generator) -> None:
        self._account = account
        self._rng = rng

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        return least(self._account.requests(), slots, self._rng)


class PowerOfTwo:
    """The better of two drawn by chance (Mitzenmacher 2001)."""

    def __init__(self, account: Account, rng: np.random.Generator) -> None:
        self._account = account
        self._rng = rng

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        if len(slots) < 2:
            return slots[0]
        drawn = [slots[int(at)] for at in self._rng.choice(len(slots), 2, replace=False)]
        return least(self._account.requests(), drawn, self._rng)


class ShortestTokens:
    """Join the queue with the fewest prompt tokens to compute."""

    def __init__(self, account: Account, rng: np.random.Generator) -> None:
        self._account = account
        self._rng = rng

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        return least(self._account.prefill_tokens(), slots, self._rng)
