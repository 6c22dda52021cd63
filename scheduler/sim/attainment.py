"""SLO attainment turned round: the load at which a policy keeps such a share of its promises."""

from collections.abc import Callable, Sequence
from math import sqrt

LOAD_LEAST, LOAD_MOST = 0.02, 2.0
"Between these is sought, as multiples of the capacity."

NEAR = 0.01
"So close to the share wanted is close enough."

APART = 1.005
"Loads are not told apart more finely than this."


def loads(kept: Callable[[float], float], shares: Sequence[float]) -> list[float]:
    """For each share the load at which it is kept, as nearly as was found.

    A share falls as load grows, but for chance: sought is the least load at which it has fallen below, by halving
    on a scale of quotients. Where the share is never kept, or always, the end of the scale is the nearest.

    >>> [round(load, 1) for load in loads(lambda load: 1.0 - load / 2, [0.75, 0.25])]
    [0.5, 1.5]

    Args:
        kept: the share that is kept at a load; asked once for each.
        shares: in any order; what was asked for one serves the next.
    """
    tried = {load: kept(load) for load in (LOAD_LEAST, LOAD_MOST)}
    return [_load(tried, kept, share) for share in shares]


def _load(tried: dict[float, float], kept: Callable[[float], float], share: float) -> float:
    while True:
        over = min((load for load in tried if tried[load] < share), default=None)
        if over is None:
            return LOAD_MOST
        under = max((load for load in tried if load < over), default=None)
        if under is None:
            return LOAD_LEAST
        nearer = min((under, over), key=lambda load: abs(tried[load] - share))
        if abs(tried[nearer] - share) <= NEAR or over < APART * under:
            return nearer
        middle = sqrt(under * over)
        tried[middle] = kept(middle)
