"""The most that can be on time where nobody is served by two endpoints at once: closer than the pooled server's bound.

The pooled server splits a prompt over all endpoints. Here each request that is on time was served by one of them, which
does one thing at a time, may interrupt it for free, and knows what comes. A set is on time on one endpoint exactly if
it is in the order of arrival, since due moments come in that order; the best set by any values of its members follows by
dynamic programming over the moment at which the endpoint is free. What is hard is that nobody counts twice. So every
request has a price: an endpoint that takes it gains 1 less the price, and the price is paid for whether anybody takes it
or not. Whatever the prices, all gains and prices together are no less than the most that can be on time (Lagrange's
relaxation of "at most once"; at its best prices it is at least as tight as the linear program over shares of requests),
and they are moved by subgradients, up where several take the same and down where nobody does.

Time is cut into cells, arrivals, work and due moments rounded down to them: who was on time still is.
"""

import math
from collections.abc import Sequence

import numpy as np

from scheduler.state import Bools, Floats

CELLS = 500, 4000
"Of the promised seconds: few to find prices with, then more, as half a cell of each one's work is given away."

ROUNDS_MAX = 200
"Of moving prices, for each of these. Every round gives a bound; the later ones gain little."

STALLED = 8
"Rounds without a lower bound after which less is hoped for."

HOPE = 0.02
"The first hope for the next bound: lower by this part of all."

HOPE_MIN = 0.2
"Of a request; to hope for less is to have done."

CARRIED = 0.7
"What a round's direction keeps of the one before: bare subgradients zigzag."

FIRST_QUANTILES = 0.5, 0.8, 0.9, 0.95, 0.98, 1.0
"Of work: who takes at least so long is worth all of it to an endpoint at the first prices, others in proportion."


def most_on_time(
    at_s: Floats, work: Floats, allowed_s: float, *, cells: Sequence[int] = CELLS
) -> int:
    """How many can end within `allowed_s` of their arrival, at most, each on one endpoint.

    Args:
        at_s: float64[n], arrivals, rising.
        work: float64[n, n_endpoints], seconds that each takes on each endpoint.
        allowed_s: promised to everybody.
        cells: of the promised seconds, one pass each; 1 byte for each, request and endpoint.

    >>> most_on_time(np.zeros(3), np.full((3, 2), 2.0), 3.0)  # a pooled server would end all three at 3.0
    2
    """
    can = (work <= allowed_s).any(axis=1)
    at_s, work = at_s[can], work[can]
    if not len(at_s):
        return 0
    least, prices = float(len(at_s)), None
    for count in cells:
        endpoints = _endpoints(at_s, work, allowed_s, count)
        if len(endpoints) == 1:
            found = endpoints[0].best(np.ones(len(at_s)))[0]
        else:
            start = _first_prices(endpoints, work) if prices is None else prices
            found, prices = _least(endpoints, start)
        least = min(least, found)
    return int(least + 1e-6)


def _endpoints(at_s: Floats, work: Floats, allowed_s: float, cells: int) -> list["_Endpoint"]:
    cell_s = allowed_s / cells
    # A hair more, so that who ends exactly on the edge of a cell is not taken to be late.
    arrivals = np.floor(at_s / cell_s + 1e-6).astype(int)
    took = np.floor(work / cell_s + 1e-6).astype(int)
    return [_Endpoint(arrivals, own, cells) for own in took.T]


def _first_prices(endpoints: Sequence["_Endpoint"], work: Floats) -> Floats:
    """An endpoint's second is worth the same all the time; how much, is tried."""
    least = work.min(axis=1)
    tried = [1.0 - np.minimum(1.0, least / np.quantile(least, one)) for one in FIRST_QUANTILES]
    return min(tried, key=lambda prices: _bound(endpoints, prices)[0])


def _bound(endpoints: Sequence["_Endpoint"], prices: Floats) -> tuple[float, Floats]:
    """The bound at these prices, and how many endpoints take each request."""
    total, takers = float(prices.sum()), np.zeros(len(prices))
    for endpoint in endpoints:
        gain, taken = endpoint.best(1.0 - prices)
        total += gain
        takers += taken
    return total, takers


def _least(endpoints: Sequence["_Endpoint"], prices: Floats) -> tuple[float, Floats]:
    """The lowest bound that moving prices finds, and its prices."""
    best, best_prices = math.inf, prices
    hope, direction, stalled = max(1.0, HOPE * len(prices)), np.zeros(len(prices)), 0
    for _ in range(ROUNDS_MAX):
        total, takers = _bound(endpoints, prices)
        # A hair lower is no progress, or little hope would never be left for less.
        stalled = 0 if total < best - 0.1 * hope else stalled + 1
        if total < best:
            best, best_prices = total, prices
        if stalled > STALLED:
            hope, stalled = hope / 2, 0
            prices, direction = best_prices, np.zeros(len(prices))
            if hope < HOPE_MIN:
                break
            continue
        direction = 1.0 - takers + CARRIED * direction
        length = float(direction @ direction)
        if length == 0:  # everybody is taken exactly once: no bound is lower
            break
        prices = np.clip(prices - (total - best + hope) / length * direction, 0.0, 1.0)
    return best, best_prices


class _Endpoint:
    """One endpoint and what everybody takes there, in cells."""

    def __init__(self, arrivals: np.ndarray, took: np.ndarray, cells: int) -> None:
        self._gaps = np.diff(arrivals, prepend=arrivals[:1]).tolist()
        self._took = took.tolist()
        self._width = cells + 2
        "Ends a request can have, from its arrival on: due moments are rounded down, later by a cell at most."

    def best(self, values: Floats) -> tuple[float, Bools]:
        """The most that a set on time is worth here, and that set; who is worth nothing is not in it."""
        width = self._width
        worth = np.zeros(width)
        "By how long after the present arrival the endpoint is free at the latest, what the set so far is worth."
        gains: list[np.ndarray | None] = []
        for gap, took, value in zip(self._gaps, self._took, values.tolist(), strict=True):
            if gap:
                later = min(gap, width - 1)
                worth = np.concatenate([worth[later:], np.full(later, worth[-1])])
            if value <= 1e-9 or took >= width:
                gains.append(None)
                continue
            taken = worth[: width - took] + value
            gains.append(taken > worth[took:])
            worth = np.concatenate([worth[:took], np.maximum(taken, worth[took:])])
        free, chosen = width - 1, np.zeros(len(gains), dtype=bool)
        for at in range(len(gains) - 1, -1, -1):
            gained, took = gains[at], self._took[at]
            if gained is not None and free >= took and gained[free - took]:
                chosen[at] = True
                free -= took
            free = min(free + self._gaps[at], width - 1)
        return float(worth[-1]), chosen
