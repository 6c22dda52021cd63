"""What a session's earlier prompts have left where, for requests that bring no blocks.

Requests of one session share their beginning: who gave us the last one has it in its cache, as far as this one's
prompt is that one's and more. How far that is true is learned from what engines really find.
"""

import msgspec

SMOOTH = 0.1
"What one answer weighs in how far an endpoint's sessions are believed."

TOKENS_MAX = 2_000_000
"Tokens remembered of an endpoint whose capacity is not known."

SESSIONS_MAX = 16_384
"Sessions remembered of an endpoint."


class _Cache(msgspec.Struct, eq=False):
    """One endpoint's."""

    tokens: dict[str, int] = {}
    "Of each session's last prompt and answer, the least recent first."
    total: int = 0
    room: int = TOKENS_MAX
    trust: float = 1.0
    "What part of a session's tokens is really found."


class Sessions:
    """Which endpoint has how much of a session."""

    def __init__(self) -> None:
        """Nobody has anything."""
        self._caches: list[_Cache] = []
        self._holders: dict[str, dict[int, None]] = {}

    def open(self, slot: int, kv_tokens: int, *, keeps: bool = True) -> None:
        """A new endpoint, whose cache is empty."""
        if slot == len(self._caches):
            self._caches.append(_Cache())
        self.close(slot)
        self._caches[slot] = _Cache()
        self.resize(slot, kv_tokens, keeps=keeps)

    def resize(self, slot: int, kv_tokens: int, *, keeps: bool = True) -> None:
        """How much its engine can hold, 0: unknown; and whether it keeps anything beyond the request it was for."""
        self._caches[slot].room = (kv_tokens or TOKENS_MAX) * keeps
        self._evict(slot)

    def close(self, slot: int) -> None:
        """It is gone, or its engine began anew."""
        for session in list(self._caches[slot].tokens):
            self._forget(slot, session)

    def match(self, session: str, prompt_tokens: int) -> dict[int, float]:
        """Tokens of such a prompt that each slot is believed to have; slots that have none are left out."""
        return {
            slot: self._caches[slot].trust * self.expected(slot, session, prompt_tokens)
            for slot in self._holders.get(session, ())
        }

    def expected(self, slot: int, session: str, prompt_tokens: int) -> int:
        """The most that it can have: what was there last, or all of this prompt."""
        return min(self._caches[slot].tokens.get(session, 0), prompt_tokens)

    def insert(self, slot: int, session: str, tokens: int) -> None:
        """A request of this session is there, so many tokens long."""
        cache = self._caches[slot]
        cache.total += tokens - cache.tokens.pop(session, 0)
        cache.tokens[session] = tokens
        self._holders.setdefault(session, {})[slot] = None
        self._evict(slot)

    def correct(self, slot: int, *, expected_tokens: int, cached_tokens: int) -> None:
        """What the engine says it found, against the most that it could."""
        if expected_tokens > 0:
            cache = self._caches[slot]
            share = min(1.0, cached_tokens / expected_tokens)
            cache.trust += SMOOTH * (share - cache.trust)

    def _evict(self, slot: int) -> None:
        cache = self._caches[slot]
        while cache.total > cache.room or len(cache.tokens) > SESSIONS_MAX:
            self._forget(slot, next(iter(cache.tokens)))

    def _forget(self, slot: int, session: str) -> None:
        cache = self._caches[slot]
        cache.total -= cache.tokens.pop(session)
        holders = self._holders[session]
        del holders[slot]
        if not holders:
            del self._holders[session]
