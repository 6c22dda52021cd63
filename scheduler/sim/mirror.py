"""What an endpoint's engine holds in its cache, as its worker tells it where the engine publishes KV events.

The live worker computes names from token ids (`workers.kv_mirror`); here the world knows how each text is called, and
what is told of them is the live worker's own `Teller`. As there, a block of the wire is there while the engine's block
is that ends it.
"""

from collections.abc import Callable

from scheduler.accounts import Teller
from scheduler.prefix import Account
from scheduler.sim.engine import Engine
from scheduler.sim.sequence import Sequence

Text = tuple[tuple[str, ...], int]
"A prompt's blocks on the wire, and the engine's tokens in each."


class Mirror:
    """Follows one engine from its empty beginning."""

    def __init__(self, engine: Engine, text_of: Callable[[str], Text]) -> None:
        """`text_of` knows every sequence of the engine by its id."""
        self._text_of = text_of
        self._block_size = engine.settings.block_size
        self._teller = Teller()
        self._names: dict[int, tuple[str, ...]] = {}
        "Blocks of the wire that end in each of the engine's, by key."
        engine.holdings.on_seal = self._store
        engine.kv.on_evict = self._remove

    def account(self) -> Account:
        """What the next beat tells; here every beat arrives."""
        account = self._teller.account()
        self._teller.told(account.epoch, account.seq)
        return account

    def _store(self, sequence: Sequence, start: int, stop: int) -> None:
        blocks, share = self._text_of(sequence.id)
        size = self._block_size
        for at in range(start, min(stop, len(blocks) * share // size + 1)):
            ended = blocks[at * size // share : (at + 1) * size // share]
            if ended and sequence.keys[at] not in self._names:
                self._names[sequence.keys[at]] = ended
                for block in ended:
                    self._teller.store(block)

    def _remove(self, key: int) -> None:
        for block in self._names.pop(key, ()):
            self._teller.remove(block)
