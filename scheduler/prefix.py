"""Which prompt begins like which, and who has that beginning in its cache.

A block's hash is chained over all blocks before it, so that equal hashes mean equal beginnings. The client
computes them; this half of the file therefore needs nothing heavy.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

BLOCK_TOKENS = 128
"Tokens a block on the wire: fine enough for chat, and 64k tokens in 512 hashes."

TEXT_BYTES = 4
"Bytes of UTF-8 text that count as one token."

HASH_BYTES = 6
"12 hex digits: one false match in 2**48 pairs, and a false match only costs a poorer choice."


def blocks(
    prompt: str | Sequence[int], block_tokens: int = BLOCK_TOKENS, limit: int = 512
) -> tuple[str, ...]:
    """The chained hashes of a prompt's whole blocks, first block first; a partial last block has none.

    Args:
        prompt: text, of which four UTF-8 bytes count as one token, or token ids.
        block_tokens: tokens a block.
        limit: the most blocks that are hashed; what lies behind cannot be matched.

    >>> a, b = blocks("x" * 1024), blocks("x" * 512 + "y" * 512)
    >>> len(a), a[0] == b[0], a[1] == b[1]
    (2, True, False)
    """
    if isinstance(prompt, str):
        raw, size = prompt.encode(), block_tokens * TEXT_BYTES
    else:
        raw, size = b"".join(t.to_bytes(4, "little") for t in prompt), block_tokens * 4
    digest = b""
    chain: list[str] = []
    for at in range(0, min(len(raw) - size + 1, limit * size), size):
        digest = blake2b(digest + raw[at : at + size], digest_size=HASH_BYTES).digest()
        chain.append(digest.hex())
    return tuple(chain)


class Index:
    """What each endpoint's prefix cache is believed to hold: least recently used blocks go first, tails before heads.

    A belief, corrected by facts: an endpoint that reports less than was believed gets a smaller capacity here, one
    that confirms it grows back.
    """

    def __init__(self, blocks_max: int = 16_384) -> None:
        """Bound each endpoint to `blocks_max` blocks, or to its own capacity where that is known and smaller."""
        self._blocks_max = blocks_max
        self._holders: dict[str, int] = {}
        self._held: list[dict[str, None]] = []
        self._known: list[int] = []
        self._room: list[float] = []

    def open(self, slot: int, kv_tokens: int) -> None:
        """A new endpoint, whose cache is empty."""
        if slot == len(self._held):
            self._held.append({})
            self._known.append(0)
            self._room.append(0.0)
        self.close(slot)
        self._known[slot] = min(self._blocks_max, kv_tokens // BLOCK_TOKENS or self._blocks_max)
        self._room[slot] = float(self._known[slot])

    def close(self, slot: int) -> None:
        """It is gone, or its engine began anew."""
        self._evict(slot, 0)

    def match(self, chain: Sequence[str]) -> dict[int, int]:
        """How many blocks from the start each slot holds without a gap; slots that hold none are left out."""
        found: dict[int, int] = {}
        holders = self._holders.get(chain[0], 0) if chain else 0
        for depth, block in enumerate(chain):
            still = holders & self._holders.get(block, 0)
            if still != holders:
                for slot in _slots(holders & ~still):
                    found[slot] = depth
            holders = still
            if not holders:
                return found
        for slot in _slots(holders):
            found[slot] = len(chain)
        return found

    def insert(self, slot: int, chain: Sequence[str]) -> None:
        """This prompt goes there: its blocks are the most recent, the first of them most of all."""
        held = self._held[slot]
        for block in reversed(chain):
            if block in held:
                del held[block]
            else:
                self._holders[block] = self._holders.get(block, 0) | (1 << slot)
            held[block] = None
        self._evict(slot, int(self._room[slot]))

    def correct(self, slot: int, *, believed_tokens: int, cached_tokens: int) -> None:
        """What the engine says it found, against what was believed when it was chosen."""
        if believed_tokens <= 0:
            return
        if cached_tokens < 0.5 * believed_tokens:
            self._room[slot] *= 0.9
        elif cached_tokens >= believed_tokens:
            self._room[slot] = min(float(self._known[slot]), self._room[slot] * 1.05 + 1.0)
        self._evict(slot, int(self._room[slot]))

    def _evict(self, slot: int, room: int) -> None:
        held = self._held[slot]
        while len(held) > room:
            block = next(iter(held))
            del held[block]
            left = self._holders[block] & ~(1 << slot)
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]


def _slots(mask: int) -> Iterable[int]:
    """The positions of the bits set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
