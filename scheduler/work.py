"""What is left to compute of a prompt on every slot, looked up again only when the prefix index has changed."""

import functools
import math
from collections.abc import Sequence

import msgspec
import numpy as np

from scheduler import cost
from scheduler.prefix import BLOCK_TOKENS, Index, slots
from scheduler.sessions import Sessions
from scheduler.state import Endpoint, Floats, Ticket

KNOWN_MAX = 4096
"Requests for which it is remembered; where there are more, all are looked up anew."


class Work(msgspec.Struct, frozen=True, dict=True):
    """One prompt's, without regard to speed."""

    prompt: float
    "All its tokens, at least one."

    cached: Floats | None
    "Of them, what each slot has: never the last, which an engine always computes. None: nobody has any."

    tokens: Floats | float
    "The others."

    pairs: Floats | float
    "Pairs of attention of those."

    @functools.cached_property
    def new(self) -> Floats | None:
        """The part of the prompt that is not cached; None: nobody has any. Nobody asks for one with a promise."""
        return None if self.cached is None else (self.prompt - self.cached) / self.prompt


class Offer(msgspec.Struct, frozen=True):
    """What one request would cost on every slot."""

    ticket: Ticket
    work: Work
    "What is left to compute of its prompt."
    kv: float
    "The KV tokens that it wants to hold: its prompt and a part of its expected answer."
    work_s: Floats
    "Seconds of the endpoint's time."
    service_s: Floats
    "The same and the overhead; `inf` where it may not go."
    is_second: bool = False
    "Its prompt is computed, and only its decode leg is asked for."

    @property
    def alone_s(self) -> float:
        """Seconds to its first token on its best endpoint, if nothing stood before it."""
        return self.service_s.item(self.service_s.argmin())

    def tokens(self, slot: int) -> float:
        """What this slot would compute of its prompt."""
        if self.is_second:
            return 0.0
        work = self.work
        return work.prompt if work.cached is None else work.prompt - work.cached.item(slot)

    def best_cached(self, slot: int) -> tuple[float, float]:
        """Tokens of its prompt that this slot has, and the most that any has where it may go."""
        cached = self.work.cached
        if cached is None:
            return 0.0, 0.0
        most = cached.argmax()
        if self.service_s.item(most) < math.inf:
            return cached.item(slot), cached.item(most)
        may_go = self.service_s < math.inf
        return cached.item(slot), float(np.maximum.reduce(cached, where=may_go, initial=0.0))


class _Known(msgspec.Struct):
    version: int
    "Of the index."
    held: tuple[tuple[int, int], ...]
    n_slots: int
    work: Work


class Works:
    """What is left of every prompt that waits."""

    def __init__(
        self, prefixes: Index, sessions: Sessions, by_slot: Sequence[Endpoint | None]
    ) -> None:
        """Look prompts up here, for the endpoints of the moment."""
        self._prefixes = prefixes
        self._sessions = sessions
        self._by_slot = by_slot
        self._known: dict[str, _Known] = {}

    def of(self, ticket: Ticket) -> Work:
        """What is left of this one."""
        request = ticket.request
        if request.blocks:
            return self._by_blocks(ticket)
        cached = None
        if request.session:
            cached = np.zeros(len(self._by_slot))
            found = self._sessions.match(request.session, ticket.prompt_tokens)
            for slot, tokens in found.items():
                cached[slot] = tokens
        return left(ticket, cached)

    def forget(self, request_id: str) -> None:
        """It waits no longer."""
        self._known.pop(request_id, None)

    def _by_blocks(self, ticket: Ticket) -> Work:
        n_slots, version = len(self._by_slot), self._prefixes.version
        known = self._known.get(ticket.id)
        if known is not None and known.work.prompt != max(1, ticket.prompt_tokens):
            known = None  # a guess that was corrected
        if known is not None and known.version == version:
            return known.work
        held = self._prefixes.held(ticket.request.blocks)
        if known is not None and known.held == held and known.n_slots == n_slots:
            known.version = version
            return known.work
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        work = left(ticket, _dense(held, n_slots) if held else None)
        self._known[ticket.id] = _Known(version, held, n_slots, work)
        return work


@functools.lru_cache(maxsize=256)
def _dense(held: tuple[tuple[int, int], ...], n_slots: int) -> Floats:
    """Tokens by slot. Many who wait begin alike."""
    cached = np.zeros(n_slots)
    for mask, depth in held:
        cached[list(slots(mask))] = depth * BLOCK_TOKENS
    cached.setflags(write=False)  # many share it
    return cached


def left(ticket: Ticket, cached: Floats | None) -> Work:
    """What is left of its prompt where so much is cached; float64[n_slots], None: nobody has any."""
    prompt = float(max(1, ticket.prompt_tokens))
    if cached is None:
        return Work(prompt, None, prompt, cost.pairs(prompt, prompt))
    if cached.item(cached.argmax()) > prompt - 1.0:
        cached = np.minimum(cached, prompt - 1.0)
    tokens = prompt - cached
    return Work(prompt, cached, tokens, cost.pairs(tokens, prompt))
