"""Which blocks of KV are in use, each counted once however many requests begin with it.

Agents share a long beginning: counted for each of them, it would fill an engine that is nearly empty.
"""

from collections.abc import Collection, Sequence


class Pins:
    """How many of an endpoint's requests hold each block; a chain that is held is held from its start."""

    def __init__(self) -> None:
        """Nothing is in use."""
        self._counts: list[dict[str, int]] = []

    def open(self, slot: int) -> None:
        """A new endpoint holds nothing."""
        if slot == len(self._counts):
            self._counts.append({})
        self._counts[slot].clear()

    def hold(self, slot: int, chain: Sequence[str]) -> int:
        """One request more holds these; returns how many nobody held before."""
        counts = self._counts[slot]
        fresh = 0
        for block in chain:
            count = counts.get(block, 0)
            fresh += not count
            counts[block] = count + 1
        return fresh

    def drop(self, slot: int, chain: Sequence[str]) -> int:
        """One request less holds these; returns how many nobody holds now."""
        counts = self._counts[slot]
        freed = 0
        for block in chain:
            count = counts[block] - 1
            if count:
                counts[block] = count
            else:
                del counts[block]
                freed += 1
        return freed

    def held(self, slot: int) -> Collection[str]:
        """The blocks in use there. Of a chain as many as asked for are, if the last of those is."""
        return self._counts[slot].keys()
