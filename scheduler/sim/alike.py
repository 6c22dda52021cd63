"""Which prompts of a recording begin alike, as the numbered blocks that arrivals want.

Clients name blocks by hash, or only a session. Of a session each turn begins as the turn before did, for so many
tokens as its engine found in its cache; where it found none, which may be because it was another engine, for the
usual part of what it could have found.
"""

import itertools

import numpy as np

from scheduler.prefix import BLOCK_TOKENS
from scheduler.sim.story import Story
from scheduler.wire.client import Request

CLOSE = 0.02
"Prompts counted so near to the engine's own count are counted as it does."


class Alike:
    """Hands out blocks; to be asked in the order in which the requests came."""

    def __init__(self, found: Story) -> None:
        self.block_tokens = _block_tokens(found)
        "Tokens of a block as the engine counts: a client that counts four bytes as one may be far from that."
        self._found = found
        self._numbers = itertools.count()
        self._named: dict[tuple[str, str], int] = {}
        self._turns: dict[tuple[str, str], tuple[int, ...]] = {}
        "By session, the blocks of its longest prompt so far."
        self._usual_part = _usual_part(found)

    def blocks(self, request: Request, prompt_tokens: int) -> tuple[int, ...]:
        """Those of this prompt, which has so many tokens; none where nobody knows them.

        An engine with adapters keeps each one's prefixes apart, so each model has its own.
        """
        if request.blocks:
            named = self._named
            return tuple(
                named[key] if key in named else named.setdefault(key, next(self._numbers))
                for key in [(request.model, block) for block in request.blocks]
            )
        if not (request.session and self._usual_part):
            return ()
        whose = request.model, request.session
        before = self._turns.get(whose, ())
        n_blocks = -(-prompt_tokens // self.block_tokens)
        same = before[: min(n_blocks, self._n_same(request, len(before)))]
        blocks = (*same, *itertools.islice(self._numbers, n_blocks - len(same)))
        if len(blocks) >= len(before):
            self._turns[whose] = blocks
        return blocks

    def _n_same(self, request: Request, n_before: int) -> int:
        cached = self._found.cached_tokens(request.id)
        return round(cached / self.block_tokens if cached else self._usual_part * n_before)


def n_cold(found: Story) -> int:
    """How many found a prefix in a cache of which nothing in the recording says whose it is."""
    return sum(
        bool(found.cached_tokens(request.id)) and not (request.blocks or request.session)
        for request, _ in found.ended
    )


def _block_tokens(found: Story) -> int:
    counted = [
        reward.prompt_tokens / request.prompt_tokens
        for request, reward in found.ended
        if request.blocks and request.prompt_tokens and reward.prompt_tokens
    ]
    ratio = float(np.median(counted)) if counted else 1.0
    return BLOCK_TOKENS if abs(ratio - 1.0) < CLOSE else max(1, round(ratio * BLOCK_TOKENS))


def _usual_part(found: Story) -> float:
    """What part of a session's longest prompt its next turn finds, where it finds any; 0: none ever did."""
    longest: dict[tuple[str, str], int] = {}
    parts = []
    for request, reward in sorted(found.ended, key=lambda one: one[1].enqueued_at or 0.0):
        if request.blocks or not request.session:
            continue
        whose = request.model, request.session
        before, cached = longest.get(whose, 0), found.cached_tokens(request.id)
        if before and cached:
            parts.append(min(1.0, cached / before))
        longest[whose] = max(before, reward.prompt_tokens)
    return float(np.median(parts)) if parts else 0.0
