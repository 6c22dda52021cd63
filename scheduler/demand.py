"""How many requests of the next seconds would miss their first token if an endpoint were taken now.

A request with a promised first token misses it if every endpoint is taken for longer than it can wait. Where `a`
seconds of such work come each second, Erlang's formula says what part of them finds n endpoints all taken:

    lost(0) = 1        lost(n) = a * lost(n - 1) / (n + a * lost(n - 1))

To take the k-th last for some seconds breaks as many promises as come too early in them to wait for their end, times
lost(k - 1) - lost(k): next to none while many are left, nearly all of those at the last.
"""

import math

import numpy as np

from scheduler.state import Floats
from scheduler.work import Offer

SPAN_S = 30.0
"Seconds for which a request that came counts: longer than a burst, shorter than a change of load."

COUNT_MAX = 128
"Of those, the latest that are kept."

LEAST_S = 1.0
"The shortest time over which a rate is taken: what came in the first moments says little."


class Demand:
    """What came of one model of late that could have its first token in time."""

    def __init__(self, now: float) -> None:
        """Nothing came yet."""
        self._came: Floats = np.full((3, COUNT_MAX), -math.inf)
        "Of each: when, the seconds of its work, and those for which it could wait."
        self._next = 0
        self._since = now

    def add(self, work_s: float, spare_s: float, now: float) -> None:
        """One came, which takes an endpoint so long and can wait so long for it."""
        self._came[:, self._next] = now, work_s, spare_s
        self._next = (self._next + 1) % COUNT_MAX

    def broken(self, taken_s: Floats, now: float) -> Floats:
        """Promises broken by taking endpoints for so many seconds, the one missed least first; float64[n] both.

        The first is free: if it were not, a fleet that all want could stand idle beside those who wait.
        """
        came_at = self._came[0]
        _, work_s, spare_s = self._came[:, came_at >= now - SPAN_S]
        stopped: Floats = np.maximum(taken_s[:, None] - spare_s, 0.0).sum(axis=1)
        if not stopped.any():
            return stopped
        # Where more came than is kept, the oldest kept says in what time.
        span_s = max(LEAST_S, now - max(self._since, came_at.item(self._next), now - SPAN_S))
        lost = _lost(float(work_s.sum()) / span_s, len(taken_s))
        broken: Floats = stopped / span_s * (lost[:-1] - lost[1:])[::-1]
        broken[0] = 0.0
        return broken


class Demands:
    """Of all models."""

    def __init__(self) -> None:
        """Nothing came yet."""
        self._models: dict[str, Demand] = {}

    def add(self, model: str, work_s: float, spare_s: float, now: float) -> None:
        """One came that could be in time, takes an endpoint so long and can wait so long for it."""
        demand = self._models.get(model)
        if demand is None:
            demand = self._models[model] = Demand(now)
        demand.add(work_s, spare_s, now)

    def broken(self, offer: Offer, most_s: float, declared_s: Floats, now: float) -> Floats:
        """Promises of those to come that this one would break on each endpoint; float64[n_slots].

        Args:
            offer: what it would cost, and where it may go.
            most_s: of its work, what counts.
            declared_s: float64[n_slots], seconds per token as declared: the slowest are missed least. By learned ones
                their order would change all the time.
            now: unix seconds.
        """
        broken = np.zeros(len(declared_s))
        demand = self._models.get(offer.ticket.request.model)
        if demand is not None:
            may_go = (offer.service_s < math.inf).nonzero()[0]
            first = may_go[(-declared_s[may_go]).argsort(kind="stable")]
            broken[first] = demand.broken(np.minimum(offer.work_s[first], most_s), now)
        return broken


def _lost(offered: float, most: int) -> Floats:
    """Of those who come, the part that finds 0, 1, ... `most` endpoints all taken; float64[most + 1].

    >>> _lost(1.0, 2)
    array([1. , 0.5, 0.2])
    """
    lost = [1.0]
    for n in range(1, most + 1):
        missed = offered * lost[-1]
        lost.append(missed / (n + missed))
    return np.array(lost)
