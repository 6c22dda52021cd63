"""Which prompt begins like which, and who has that beginning in its cache.

A block's hash is chained over all blocks before it, so that equal hashes mean equal beginnings. The client computes
the hashes (`blocks`); the core keeps who holds them (`Index`).
"""

import functools
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from scheduler.wire.words import BLOCKS_MAX

BLOCK_TOKENS = 128
"Tokens a block on the wire: fine enough for chat, and 64k tokens in 512 hashes."

TEXT_BYTES = 4
"Bytes of UTF-8 text that count as one token."

HASH_BYTES = 6
"12 hex digits: one false match in 2**48 pairs, and a false match only costs a poorer choice."


def blocks(prompt: str | Sequence[int]) -> tuple[str, ...]:
    """The chained hashes of a prompt's first `BLOCKS_MAX` whole blocks, first block first; a partial last block has none.

    Args:
        prompt: text, of which four UTF-8 bytes count as one token, or token ids.

    >>> a, b = blocks("x" * 1024), blocks("x" * 512 + "y" * 512)
    >>> len(a), a[0] == b[0], a[1] == b[1]
    (2, True, False)
    """
    if isinstance(prompt, str):
        raw, size = prompt.encode(), BLOCK_TOKENS * TEXT_BYTES
    else:
        raw, size = b"".join(t.to_bytes(4, "little") for t in prompt), BLOCK_TOKENS * 4
    digest = b""
    chain: list[str] = []
    for at in range(0, min(len(raw) - size + 1, BLOCKS_MAX * size), size):
        digest = blake2b(digest + raw[at : at + size], digest_size=HASH_BYTES).digest()
        chain.append(digest.hex())
    return tuple(chain)


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of its cache, as its worker passes it on: changes, numbered, in one epoch after another.

    An epoch begins with a listing of all there is, over as many accounts as it takes; every change after it follows.
    Who missed one waits for the next listing, which comes by itself.
    """

    epoch: int
    "Grows whenever the account begins anew."

    seq: int
    "1 for the first of an epoch, then one more each time; the same again where nothing is new."

    stored: tuple[str, ...] = ()
    "Blocks that are there now."

    removed: tuple[str, ...] = ()
    "Blocks that are not."

    rest: int = 0
    "How many blocks of the listing are still to come."

    was_empty: bool = False
    "Whether the cache was empty when the epoch began: whatever was believed before is void."


class _Cache:
    """What one endpoint is thought to hold. No block is in both."""

    def __init__(self) -> None:
        self.believed: dict[str, None] = {}
        "Sent there, and neither confirmed nor denied; the least recent first."
        self.told: dict[str, None] = {}
        "As the engine itself says; it also says when they go."
        self.known = 0
        "Blocks that the engine can hold."
        self.room = 0.0
        "Blocks that are believed of it."
        self.epoch = self.seq = 0
        self.is_lost = True
        "An account was missed: nothing is taken in before the next listing."
        self.listed: dict[str, None] | None = None
        "What the listing under way has named so far; None: there is none."


class Index:
    """What each endpoint's prefix cache holds: as the engine tells it where it does, as believed where not.

    A belief goes by use, the least recent first and tails before heads, and is corrected by facts: an endpoint that
    reports less than was believed gets a smaller capacity here, one that confirms it grows back.
    """

    def __init__(self, blocks_max: int = 16_384) -> None:
        """Bound each endpoint to `blocks_max` blocks, or to its own capacity where that is known and smaller."""
        self._blocks_max = blocks_max
        self._holders: dict[str, int] = {}
        self.version = 0
        "Another one, and a match may have another result."
        self._caches: list[_Cache] = []

    def open(self, slot: int, kv_tokens: int, *, keeps: bool = True) -> None:
        """A new endpoint, whose cache is empty."""
        if slot == len(self._caches):
            self._caches.append(_Cache())
        self.close(slot)
        self._caches[slot] = _Cache()
        self.version += 1
        self.resize(slot, kv_tokens, keeps=keeps)

    def resize(self, slot: int, kv_tokens: int, *, keeps: bool = True) -> None:
        """How much its engine can hold, 0: unknown; and whether it keeps anything beyond the request it was for."""
        cache = self._caches[slot]
        known = min(self._blocks_max, kv_tokens // BLOCK_TOKENS or self._blocks_max) * keeps
        if known != cache.known:
            cache.known, cache.room = known, float(known)
            self._evict(slot)

    def close(self, slot: int) -> None:
        """It is gone, or its engine began anew."""
        cache = self._caches[slot]
        for block in (*cache.believed, *cache.told):
            self._forget(slot, block)
        cache.believed.clear()
        cache.told.clear()

    def match(self, chain: Sequence[str]) -> dict[int, int]:
        """How many blocks from the start each slot holds without a gap; slots that hold none are left out."""
        return {slot: depth for mask, depth in self.held(chain) for slot in slots(mask)}

    def held(self, chain: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """The same as bits: slots that hold as much as one another, and how many blocks, the least first."""
        holders = self._holders.get(chain[0], 0) if chain else 0
        if not holders:
            return ()
        found: list[tuple[int, int]] = []
        for depth, by_block in enumerate(map(self._holders.get, chain)):
            if by_block != holders:  # else as those before it: most blocks of a chain are
                still = holders & (by_block or 0)
                if still != holders:
                    found.append((holders & ~still, depth))
                    holders = still
                    if not holders:
                        return tuple(found)
        found.append((holders, len(chain)))
        return tuple(found)

    def insert(self, slot: int, chain: Sequence[str]) -> None:
        """This prompt goes there: its blocks are the most recent, the first of them most of all."""
        cache = self._caches[slot]
        if not cache.known:
            return
        believed, told = cache.believed, cache.told
        for block in reversed(chain):
            if block in believed:
                believed[block] = believed.pop(block)
            elif block not in told:
                self._remember(slot, block)
                believed[block] = None
        self._evict(slot)

    def correct(self, slot: int, *, believed_tokens: int, cached_tokens: int) -> None:
        """What the engine says it found, against what was believed when it was chosen."""
        if believed_tokens <= 0:
            return
        cache = self._caches[slot]
        if cached_tokens < 0.5 * believed_tokens:
            cache.room *= 0.9
        elif cached_tokens >= believed_tokens:
            cache.room = min(float(cache.known), cache.room * 1.05 + 1.0)
        self._evict(slot)

    def hear(self, slot: int, account: Account) -> None:
        """What the engine itself says. Said twice or late it changes nothing; after a loss the next listing counts."""
        cache = self._caches[slot]
        if (account.epoch, account.seq) <= (cache.epoch, cache.seq):
            return
        if account.epoch > cache.epoch:
            cache.is_lost, cache.listed = account.seq != 1, {}
            if account.was_empty:
                self.close(slot)
        elif account.seq != cache.seq + 1:
            # A removal may be what was missed. What was told before stands until the listing that comes by itself.
            cache.is_lost = True
        cache.epoch, cache.seq = account.epoch, account.seq
        if not cache.is_lost:
            self._take(slot, account)

    def _take(self, slot: int, account: Account) -> None:
        cache = self._caches[slot]
        for block in account.removed:
            self._drop(slot, block)
        for block in account.stored:
            self._store(slot, block)
        if cache.listed is not None:
            cache.listed.update(dict.fromkeys(account.stored))
            if not account.rest:
                for block in [block for block in cache.told if block not in cache.listed]:
                    self._drop(slot, block)
                cache.listed = None

    def _store(self, slot: int, block: str) -> None:
        cache = self._caches[slot]
        if block in cache.told:
            return
        if block in cache.believed:
            del cache.believed[block]
        else:
            self._remember(slot, block)
        cache.told[block] = None
        if len(cache.told) > self._blocks_max:
            self._drop(slot, next(iter(cache.told)))

    def _drop(self, slot: int, block: str) -> None:
        cache = self._caches[slot]
        for held in (cache.told, cache.believed):
            if block in held:
                del held[block]
                self._forget(slot, block)

    def _evict(self, slot: int) -> None:
        cache = self._caches[slot]
        while len(cache.believed) > int(cache.room):
            block = next(iter(cache.believed))
            del cache.believed[block]
            self._forget(slot, block)

    def _remember(self, slot: int, block: str) -> None:
        self.version += 1
        self._holders[block] = self._holders.get(block, 0) | (1 << slot)

    def _forget(self, slot: int, block: str) -> None:
        self.version += 1
        left = self._holders[block] & ~(1 << slot)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


@functools.lru_cache(maxsize=4096)
def slots(mask: int) -> tuple[int, ...]:
    """The positions of the bits set, lowest first."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)
