"""Who is believed about an endpoint: what was learned of it, or what its hardware is declared to take.

What the choice not taken would have brought cannot be seen, but what it was based on can: every completion is
predicted twice, by the learned model and by the untaught one, and both are held against what it really took. Where
the learned one was worse for a while, plans are made with the untaught one, which makes them an earliest finish by
prior, until the learned one has been better for as long. It learns on meanwhile, so it can come back.

A cumulated sum (Page 1954) of how much worse it was: one bad surprise is forgiven, a prediction that is ten times off
trips it in two completions, and noise that hits both alike never does. Costs under a microsecond a completion and
nothing a decision.
"""

import numpy as np

MARGIN = 0.1
"By how much of a log error the one in charge may be worse on the mean without losing its place."

THRESHOLD = 3.0
"""
Log errors that it must have been worse by in sum.

A drift of the endpoint itself adds nothing, since both are then wrong: after a threefold slow-down log 3 on each side.
"""


class Guard:
    """A sum for each slot."""

    def __init__(self) -> None:
        """Trust what was learned."""
        self.distrusted = np.zeros(0, dtype=np.bool_)
        "Slots whose endpoints are predicted by their prior."
        self.is_on = False
        "Whether there is any."
        self.switches: list[int] = []
        "How often each slot's endpoint has passed from one to the other."
        self._sums: list[float] = []

    def open(self, slot: int) -> None:
        """An endpoint takes this slot: trusted until it is seen otherwise."""
        if slot == len(self._sums):
            self._sums.append(0.0)
            self.switches.append(0)
            self.distrusted = np.append(self.distrusted, np.False_)
        self.switches[slot] = 0
        self.set(slot, is_distrusted=False)

    def judge(self, slot: int, *, learned: float, prior: float) -> None:
        """One completion's log(actual / predicted), by either prediction."""
        worse = abs(learned) - abs(prior)
        if self.distrusted[slot]:
            worse = -worse
        self._sums[slot] = max(0.0, self._sums[slot] + worse - MARGIN)
        if self._sums[slot] > THRESHOLD:
            self.switches[slot] += 1
            self.set(slot, is_distrusted=not self.distrusted[slot])

    def set(self, slot: int, *, is_distrusted: bool) -> None:
        """Go by the prior there, or by what was learned."""
        self._sums[slot] = 0.0
        self.distrusted[slot] = is_distrusted
        self.is_on = bool(self.distrusted.any())
