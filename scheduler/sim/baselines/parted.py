"""Baselines on fleets that part prefill from decode: each as its source does it.

The first leg is bound by what the policy does anyway (`desk.Bound` or `desk.Lined`), among the endpoints it may go
to; once the prompt is computed, `Parted` asks a `Second` where to decode it. A leg that is handed back begins anew.
"""

import math
from collections import deque

import numpy as np

from scheduler import cost
from scheduler.events import Command, Event
from scheduler.sim.baselines import finish, load
from scheduler.sim.baselines.binding import Bound, Lined, Router
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.load import least
from scheduler.sim.baselines.senses import Account, Asked
from scheduler.wire.worker import Reward

DECODE = frozenset({"decode", "both"})
PREFILL = frozenset({"prefill"})


class Parted:
    """A policy with two legs, on one desk."""

    def __init__(self, desk: Desk, first: Bound | Lined, second: Router) -> None:
        """`first` binds prompts, `second` answers; both keep their books on `desk`."""
        self._desk = desk
        self._first = first
        self._second = second
        self._prefilled: deque[tuple[Asked, bytes]] = deque()

    def receive(self, event: Event, now: float) -> None:
        if isinstance(event, Reward) and event.outcome == "prefilled":
            asked = self._desk.asked(event.id)
            self._desk.learn(event, now)
            if asked is not None:
                self._prefilled.append((asked, event.kv_params))
        elif isinstance(event, Reward) and event.outcome == "returned":
            asked = self._desk.asked(event.id)
            self._desk.learn(event, now)
            if asked is not None:
                self._first.take_back(asked)
        else:
            self._first.receive(event, now)

    def decide(self, now: float) -> list[Command]:
        commands = self._first.decide(now)
        for _ in range(len(self._prefilled)):
            asked, params = self._prefilled.popleft()
            slots = self._desk.living(asked, now, DECODE)
            chosen = self._second.choose(asked, slots, now) if slots else None
            if chosen is None:
                self._prefilled.append((asked, params))
            else:
                commands.append(self._desk.send(asked, chosen, now, kv_params=params))
        return commands

    def wakeup_at(self) -> float | None:
        return self._first.wakeup_at()


class LeastKv:
    """Where the fewest KV tokens are in flight: Dynamo's decode routing, which disables overlap and counts blocks."""

    def __init__(self, account: Account, rng: np.random.Generator) -> None:
        self._account, self._rng = account, rng

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        return least(self._account.kv_tokens(), slots, self._rng)


class Kept:
    """The endpoint that was chosen for the answer before the prompt was sent; another where it has gone."""

    def __init__(self, account: Account, rng: np.random.Generator) -> None:
        self._least = load.LeastRequest(account, rng)
        self._chosen: dict[str, int] = {}

    def keep(self, asked: Asked, slot: int) -> None:
        self._chosen[asked.id] = slot

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:
        slot = self._chosen.pop(asked.id, -1)
        return slot if slot in slots else self._least.choose(asked, slots, now)


def step_s(desk: Desk, slot: int, prompt_tokens: int) -> float:
    """A decode step with this one more, by the data sheet and the policy's own book."""
    rated = cost.hardware(desk.beats[slot].hardware)
    batch, held = float(desk.ledger.seats[slot]), float(desk.ledger.kv[slot])
    return rated.step_s + rated.sequence_s * (batch + 1) + rated.kv_s * (held + prompt_tokens)


class MooncakePair:
    """Mooncake's Algorithm 1, both halves, chosen at arrival.

    The prefill of the earliest first token by an offline fit, the decode of the smallest predicted time between
    tokens; refused where either is over its promise.
    """

    def __init__(self, desk: Desk, kept: Kept) -> None:
        self._desk, self._kept = desk, kept
        self._first = finish.Mooncake(desk)

    def choose(self, asked: Asked, slots: list[int], now: float) -> int | None:
        decoding = self._desk.living(asked, now, DECODE)
        chosen = self._first.choose(asked, slots, now)
        if chosen is None or not decoding:
            return None
        paces = {slot: step_s(self._desk, slot, asked.prompt_tokens) for slot in decoding}
        best = min(decoding, key=lambda at: (paces[at], at))
        if paces[best] > (asked.request.tpot_s or math.inf):
            return None
        self._kept.keep(asked, best)
        return chosen


class LlmdPair:
    """llm-d's P/D profiles: the decode endpoint first, by its scorers; then its decider.

    With fewer uncached tokens there than the threshold all of it stays there; otherwise the prompt goes to the best
    prefill endpoint by the same scorers.
    """

    def __init__(self, desk: Desk, kept: Kept, scored: Router, *, uncached_tokens: int) -> None:
        self._desk, self._kept, self._scored, self._prefixes = desk, kept, scored, desk.prefixes
        self._uncached_tokens = uncached_tokens

    def choose(self, asked: Asked, slots: list[int], now: float) -> int | None:
        decoding = self._desk.living(asked, now, DECODE)
        if not decoding:
            return None
        chosen = self._scored.choose(asked, decoding, now)
        assert chosen is not None
        if not is_apart(asked, self._prefixes.match(asked)[chosen], self._uncached_tokens):
            return chosen
        self._kept.keep(asked, chosen)
        return self._scored.choose(asked, slots, now)


def is_apart(asked: Asked, cached: int, uncached_tokens: int) -> bool:
    """llm-d's decider: whether so much of the prompt is not cached that it is computed elsewhere.

    >>> from scheduler.wire.client import Request
    >>> asked = Asked(Request(model="m", prompt_tokens=100), "1-0", 0.0)
    >>> is_apart(asked, 90, 16), is_apart(asked, 80, 16)
    (False, True)
    """
    return asked.prompt_tokens - cached >= uncached_tokens


class Slack:
    """Kairos' second half: our reconstruction, as its first.

    The answer goes where a step with it is predicted to be the shortest, which leaves the most slack to pack into;
    the packing itself is the worker's slack-guided admission.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        return min(slots, key=lambda at: (step_s(self._desk, at, asked.prompt_tokens), at))
