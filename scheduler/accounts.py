"""What an engine's cache holds, told to the dispatcher piece by piece, in numbered accounts (`prefix.Account`).

Whoever knows the engine says what comes and goes, in the blocks of the wire; `account` is what the next beat carries.
"""

from scheduler.prefix import Account

TOLD_MAX = 512
"Blocks in one account; the rest ride on the next."


class Teller:
    """Changes in, accounts out.

    1. `store` and `remove` note what has changed; what came and went in between is told once, as it is now.
    2. `account` is what to say next, the same until `told`.
    3. `list_anew` tells all there is once more, `clear` begins with nothing.
    """

    def __init__(self) -> None:
        """Nothing is known and nothing told."""
        self._counts: dict[str, int] = {}
        "How often each block is there: an engine may have computed the same for two requests."
        self._epoch = self._seq = 0
        self._was_empty = False
        self._changes: dict[str, bool] = {}
        "What is to be told: True is stored, False removed."
        self._listing: dict[str, None] = {}
        "Which of it belongs to the listing."
        self._account: Account | None = None
        "The last one, until it is known to have arrived."

    @property
    def blocks(self) -> frozenset[str]:
        """Those that are there."""
        return frozenset(self._counts)

    @property
    def has_news(self) -> bool:
        """Whether a listing is under way, which is worth a beat of its own."""
        return bool(self._listing)

    def holds(self, block: str) -> bool:
        """Whether it is there."""
        return block in self._counts

    # From whoever knows the engine.

    def store(self, block: str) -> None:
        """One more of it is there."""
        self._counts[block] = self._counts.get(block, 0) + 1
        if self._counts[block] == 1:
            self._change(block, is_stored=True)

    def remove(self, block: str) -> None:
        """One of it is gone; it must have been stored."""
        self._counts[block] -= 1
        if not self._counts[block]:
            del self._counts[block]
            self._change(block, is_stored=False)

    def clear(self, *, is_empty: bool) -> None:
        """Begin anew. `is_empty`: the engine holds nothing; else it is only not known any more what it holds."""
        self._counts.clear()
        self.list_anew(was_empty=is_empty)

    def list_anew(self, *, was_empty: bool = False) -> None:
        """Tell all there is once more, for whoever missed a change."""
        if not was_empty and not self._epoch and not self._counts:
            return  # nothing was ever said
        is_untold = self._epoch > 0 and self._seq == 0
        self._was_empty = was_empty or (self._was_empty and is_untold)
        self._epoch += 1
        self._seq = 0
        self._changes = dict.fromkeys(self._counts, True)
        self._listing = dict.fromkeys(self._counts)
        self._account = None

    # To the dispatcher.

    def account(self) -> Account:
        """What is to be told next; the same one until `told`. Epoch 0: nothing."""
        if self._account is None:
            chosen = list(self._changes)[:TOLD_MAX]
            if chosen or (self._epoch and not self._seq):
                self._seq += 1
            stored = tuple(block for block in chosen if self._changes[block])
            removed = tuple(block for block in chosen if not self._changes[block])
            for block in chosen:
                del self._changes[block]
                self._listing.pop(block, None)
            self._account = Account(
                epoch=self._epoch,
                seq=self._seq,
                stored=stored,
                removed=removed,
                rest=len(self._listing),
                was_empty=self._was_empty,
            )
        return self._account

    def told(self, epoch: int, seq: int) -> None:
        """That account has arrived."""
        if self._account is not None and (epoch, seq) == (self._account.epoch, self._account.seq):
            self._account = None

    def _change(self, block: str, *, is_stored: bool) -> None:
        if not self._epoch:
            self._epoch = 1
        self._changes.pop(block, None)
        self._changes[block] = is_stored
        self._listing.pop(block, None)
