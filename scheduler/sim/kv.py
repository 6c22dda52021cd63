"""The paged KV cache of one engine: who holds which block, and what is still warm.

A block is either *sealed* under a key (the chained hash of all tokens up to its end) and
can be shared, or anonymous. Physical block numbers are never needed: a sealed block is its
key, and anonymous blocks are only counted. Free blocks stand in one line, as vLLM's do:
the longest unused goes first, and a request's own blocks enter the line tail first, so
that a prefix outlives its continuations.

One deviation from vLLM: a block computed twice at the same time is sealed once; the second
copy stays anonymous instead of standing in as a spare under the same key.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

ANONYMOUS = -1
"In a list of held blocks: one without a key."


class BlockPool:
    """All KV blocks of an engine.

    1. `match` finds the leading keys that are cached, `hold` takes them.
    2. `take` draws new anonymous blocks, evicting the longest unused.
    3. `seal` gives computed blocks their keys, from then on others match them.
    4. `release` puts everything a request held back in line.
    """

    __slots__ = ("_holders", "_idle", "_next_run", "capacity", "free", "on_evict")

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, f"a pool of {capacity} blocks holds nothing"
        self.capacity = capacity
        self.free = capacity
        "Blocks nobody holds, warm ones included."
        self.on_evict: Callable[[int], None] | None = None
        "Told each key that is forgotten for want of room."
        # Sealed blocks, also those that nobody holds at the moment: key -> holders.
        self._holders: dict[int, int] = {}
        # The line of free blocks: a key, or a negative number for a run of anonymous ones.
        self._idle: OrderedDict[int, int] = OrderedDict({-1: capacity})
        self._next_run = -2

    @property
    def used(self) -> int:
        return self.capacity - self.free

    @property
    def cached(self) -> int:
        """Blocks that a prompt could match."""
        return len(self._holders)

    def match(self, keys: Sequence[int], limit: int) -> int:
        """How many of the first `limit` keys are cached without a gap from the start."""
        holders = self._holders
        n_matched = 0
        for key in keys[:limit]:
            if key not in holders:
                break
            n_matched += 1
        return n_matched

    def idle(self, keys: Iterable[int]) -> int:
        """How many of these cached keys nobody holds: holding them uses up free blocks."""
        holders = self._holders
        return sum(holders[key] == 0 for key in keys)

    def hold(self, keys: Iterable[int]) -> None:
        """Share cached blocks: none of them can be evicted until released."""
        holders = self._holders
        for key in keys:
            n_holders = holders[key]
            if n_holders == 0:
                del self._idle[key]
                self.free -= 1
            holders[key] = n_holders + 1

    def take(self, n_blocks: int) -> None:
        """Draw anonymous blocks from the head of the line, evicting what they cached."""
        assert n_blocks <= self.free, f"{n_blocks} blocks wanted, {self.free} free"
        self.free -= n_blocks
        idle = self._idle
        while n_blocks:
            key = next(iter(idle))
            count = idle[key]
            if count > n_blocks:
                idle[key] = count - n_blocks
                return
            del idle[key]
            n_blocks -= count
            if key >= 0:
                del self._holders[key]
                if self.on_evict is not None:
                    self.on_evict(key)

    def seal(self, held: list[int], keys: Sequence[int], start: int, stop: int) -> None:
        """Give the computed blocks `held[start:stop]` their keys, in place."""
        fresh = keys[start:stop]
        if self._holders.keys().isdisjoint(fresh):
            self._holders.update(dict.fromkeys(fresh, 1))
            held[start:stop] = fresh
            return
        for index, key in enumerate(fresh, start):
            if key not in self._holders:
                self._holders[key] = 1
                held[index] = key

    def release(self, held: Sequence[int]) -> None:
        """Put a request's blocks back in line, its last block first."""
        holders, idle = self._holders, self._idle
        for key in reversed(held):
            if key == ANONYMOUS:
                self._append_anonymous()
                continue
            n_holders = holders[key] - 1
            holders[key] = n_holders
            if n_holders == 0:
                idle[key] = 1
                self.free += 1

    def reset(self) -> bool:
        """Forget every cached block; refused, as in vLLM, while any block is held."""
        if self.used:
            return False
        self._holders.clear()
        self._idle = OrderedDict({self._next_run: self.capacity})
        self._next_run -= 1
        return True

    def _append_anonymous(self) -> None:
        self.free += 1
        last = next(reversed(self._idle), 0)
        if last < 0:
            self._idle[last] += 1
            return
        self._idle[self._next_run] = 1
        self._next_run -= 1
