"""Running quantiles over the most recent values, as plain numbers that a snapshot can hold."""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator


class Window:
    """The last `size` values, sorted as they come.

    >>> lengths = Window(3, [10, 500, 20, 30])
    >>> lengths.quantile(0.5), list(lengths)
    (30.0, [500.0, 20.0, 30.0])
    """

    __slots__ = ("_recent", "_size", "_sorted")

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        """Begin with these, oldest first."""
        self._size = size
        self._recent: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        for value in values:
            self.add(value)

    def __len__(self) -> int:
        return len(self._recent)

    def __iter__(self) -> Iterator[float]:
        return iter(self._recent)

    def add(self, value: float) -> None:
        """One more; the oldest goes when the window is full."""
        value, recent, ordered = float(value), self._recent, self._sorted
        if len(recent) == self._size:
            del ordered[bisect_left(ordered, recent[0])]
        recent.append(value)
        insort(ordered, value)

    def share(self, value: float) -> float:
        """What part of them does not exceed this value; there must be one."""
        return bisect_right(self._sorted, value) / len(self._sorted)

    def quantile(self, part: float) -> float:
        """The value that this part of them does not exceed; there must be one."""
        return self._sorted[min(len(self._sorted) - 1, int(part * len(self._sorted)))]
