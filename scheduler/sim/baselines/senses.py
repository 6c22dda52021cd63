"""What a router of the field may know of requests and endpoints.

A baseline is handed at birth exactly the senses that the real one has, as objects of these types; what it is not
handed it cannot read. How old each is, is part of the type:

    Account    the router's own book of what it has sent: exact at once for sending; answers count when they pass
    Scrapes    figures of engines: as old as a scrape and a hop
    Prefixes   the router's own guess of caches, from what it has sent: never corrected
    Costs      predicted seconds, from the same learned cost model that ships; learned when answers pass
"""

import msgspec
import numpy as np

from scheduler import cost
from scheduler.ledger import Ledger
from scheduler.predict import Predictor
from scheduler.prefix import BLOCK_TOKENS, Index
from scheduler.state import Floats
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat

NEVER = float("inf")


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A request as its reader sees it."""

    request: Request
    entry: str
    enqueued_at: float

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_tokens(self) -> int:
        return self.request.prompt_tokens or 1

    @property
    def due_at(self) -> float:
        """When the first token is due; `inf` without a promise."""
        ttft_s, deadline_s = self.request.ttft_s, self.request.deadline_s
        promised = min(NEVER if s is None else s for s in (ttft_s, deadline_s))
        return self.enqueued_at + promised


class Account:
    """What was sent to each slot and has not been answered, by the router's own book."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def requests(self) -> list[float]:
        """Requests in flight."""
        found: list[float] = self._ledger.seats.tolist()
        return found

    def prefill_tokens(self) -> list[float]:
        """Uncached prompt tokens whose first token has not been seen."""
        found: list[float] = self._ledger.tokens.tolist()
        return found

    def kv_tokens(self) -> list[float]:
        """Prompts (and usual answers) of all in flight."""
        found: list[float] = self._ledger.kv.tolist()
        return found


class Scrapes:
    """Each engine's own figures at its last scrape."""

    def __init__(self, beats: list[Beat]) -> None:
        self._beats = beats

    def running(self) -> list[int]:
        return [beat.running for beat in self._beats]

    def waiting(self) -> list[int]:
        """In the engine's own line."""
        return [beat.queued for beat in self._beats]

    def kv_usage(self) -> list[float]:
        return [beat.kv_usage for beat in self._beats]


class Prefixes:
    """Which prompts were sent where, in blocks of 128 tokens; least recently used go first."""

    def __init__(self, blocks_max: int) -> None:
        """Remember at most `blocks_max` blocks a slot: the router's own limit, it does not ask the engine."""
        self._index = Index(blocks_max)
        self._n_slots = 0

    def open(self, slot: int) -> None:
        self._index.open(slot, 0)
        self._n_slots = max(self._n_slots, slot + 1)

    def match(self, asked: Asked) -> list[int]:
        """Tokens of this prompt believed cached on each slot; at least one is always computed."""
        found = [0] * self._n_slots
        for slot, blocks in self._index.match(asked.request.blocks).items():
            found[slot] = min(blocks * BLOCK_TOKENS, asked.prompt_tokens - 1)
        return found

    def insert(self, slot: int, asked: Asked) -> None:
        self._index.insert(slot, asked.request.blocks)


class Costs:
    """Predicted seconds on each slot; float64[n_slots]."""

    def __init__(self, predictor: Predictor, ledger: Ledger) -> None:
        self._predictor = predictor
        self._ledger = ledger

    def backlog_s(self, now: float) -> Floats:
        """Until what was sent before has its first token."""
        rates = self._predictor.rates(self._ledger.decode_kv)
        return self._ledger.backlog(rates, now).seconds(rates)

    def service_s(self, asked: Asked, cached: list[int]) -> Floats:
        """Of the request itself, from its begin to its first token."""
        rates = self._predictor.rates(self._ledger.decode_kv)
        tokens = asked.prompt_tokens - np.asarray(cached, dtype=np.float64)
        pairs = cost.pairs(tokens, float(asked.prompt_tokens))
        found: Floats = rates.overhead_s + tokens * rates.token_s + pairs * rates.pair_s
        return found
