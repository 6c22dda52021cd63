"""When each token of each answer came: what a mean over an answer hides.

Whoever decodes gains a token at the end of every step, so an answer's tokens are stretches of its engine's steps: one,
and one more for each time that it was preempted and came back.
"""

from array import array

import numpy as np

from scheduler.sim.step import Step
from scheduler.state import Floats

WORST = 10
"One in so many of an answer's gaps counts as its worst."


class Tempo:
    """The steps of one engine, and where in them each answer stands."""

    def __init__(self) -> None:
        self._ends = array("d")
        self._since: dict[str, int] = {}
        "By sequence: the step that gave it the first token of its present stretch."
        self._before: dict[str, array[float]] = {}
        "By sequence: the moments of the stretches before."

    def note(self, step: Step) -> None:
        """A step, or several in one leap, is over; told of each, in order."""
        n_before = len(self._ends)
        self._ends.extend(step.ends)
        for sequence in step.preempted:
            since = self._since.pop(sequence.id, None)
            if since is not None:
                self._before.setdefault(sequence.id, array("d")).extend(self._ends[since:n_before])
        for sequence in step.prefilled:
            self._since[sequence.id] = len(self._ends) - 1

    def taken(self, sequence_id: str) -> Floats:
        """The moments of all tokens of an answer that has just ended; float64[n_tokens], forgotten with this."""
        before = self._before.pop(sequence_id, array("d"))
        since = self._since.pop(sequence_id, len(self._ends))
        return np.array(before + self._ends[since:])

    def forget(self, sequence_id: str) -> None:
        """It was aborted."""
        self._since.pop(sequence_id, None)
        self._before.pop(sequence_id, None)


def worst_s(gaps_s: Floats) -> float:
    """Mean of the longest tenth of the gaps, at least one.

    >>> round(worst_s(np.array([0.1] * 19 + [0.5])), 3)
    0.3
    """
    n_worst = -(-len(gaps_s) // WORST)
    return float(np.sort(gaps_s)[-n_worst:].mean())
