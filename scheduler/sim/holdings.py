"""Which KV blocks each sequence of an engine holds: found in the cache, taken, sealed for others, let go or kept.

The pool counts blocks and knows keys; this knows whose they are.
"""

from collections.abc import Callable

from scheduler.sim.arguments import EngineSettings
from scheduler.sim.kv import ANONYMOUS, BlockPool
from scheduler.sim.sequence import Sequence

OnSeal = Callable[[Sequence, int, int], None]
"Called with a sequence, and from which of its blocks to which others can share them from now on."


class Holdings:
    """The life of a sequence's blocks.

    1. `hits` finds its cached ones, `fits` says whether there is room for the others.
    2. `begin` holds the cached ones, `take` draws new ones as it grows.
    3. `seal` lets others share those that are computed.
    4. `let_go` frees them all, or keeps them for another engine until `forget`.
    """

    def __init__(self, pool: BlockPool, settings: EngineSettings) -> None:
        self.pool = pool
        self.on_seal: OnSeal | None = None
        self._block_size = settings.block_size
        self._caches = settings.prefix_caching
        self._reserves_prompt = settings.reserve_full_isl
        self.kept: dict[str, list[int]] = {}
        "Blocks that ended sequences hold for other engines, shared ones with each; `let_go` and `forget` write it."

    def blocks(self, tokens: int) -> int:
        """How many hold so many tokens."""
        return -(-tokens // self._block_size)

    def hits(self, sequence: Sequence) -> int:
        """Cached leading blocks; never the whole text, since something must be computed."""
        if not self._caches:
            return 0
        limit = (sequence.total_tokens - 1) // self._block_size
        return self.pool.match(sequence.keys, limit)

    def fits(self, sequence: Sequence, n_hits: int, tokens: int) -> bool:
        """Whether so many tokens of it have room now, where so many leading blocks are cached."""
        if self._reserves_prompt:
            tokens = sequence.total_tokens
        wanted = self.blocks(tokens) - n_hits
        if wanted + n_hits <= self.pool.free:
            return True  # even were all hits idle: spares counting them
        return wanted + self.pool.idle(sequence.keys[:n_hits]) <= self.pool.free

    def begin(self, sequence: Sequence, n_hits: int) -> None:
        """Hold what is cached of it: that much is computed."""
        hits = list(sequence.keys[:n_hits])
        self.pool.hold(hits)
        sequence.held = hits
        sequence.sealed = n_hits
        sequence.computed = n_hits * self._block_size

    def take(self, sequence: Sequence, n_blocks: int) -> None:
        """Draw so many more for it; there must be room."""
        self.pool.take(n_blocks)
        sequence.held.extend([ANONYMOUS] * n_blocks)

    def own(self, sequence: Sequence, n_blocks: int) -> None:
        """It has so many in all, those included that were drawn for all decodes together."""
        sequence.held.extend([ANONYMOUS] * (n_blocks - len(sequence.held)))

    def seal(self, sequence: Sequence, tokens: int) -> None:
        """So many of its tokens are computed: others may share the full blocks."""
        n_full = min(tokens // self._block_size, len(sequence.keys))
        if self._caches and n_full > sequence.sealed:
            self.pool.seal(sequence.held, sequence.keys, sequence.sealed, n_full)
            if self.on_seal is not None:
                self.on_seal(sequence, sequence.sealed, n_full)
            sequence.sealed = n_full

    def let_go(self, sequence: Sequence, *, keeps: bool = False) -> None:
        """Free all it holds, or keep it for another engine."""
        if keeps:
            self.kept[sequence.id] = sequence.held
        else:
            self.pool.release(sequence.held)
        sequence.held = []
        sequence.sealed = 0

    def forget(self, sequence_id: str) -> bool:
        """Free what an ended sequence left; False where that has happened."""
        held = self.kept.pop(sequence_id, None)
        if held is None:
            return False
        self.pool.release(held)
        return True
