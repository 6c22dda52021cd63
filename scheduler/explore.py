"""Exploration: an endpoint drawn among those whose predicted first token cannot be told apart, with exact chances.

A Thompson draw on the residual: each candidate's log seconds plus a draw of what the prediction does not know, and
the smallest wins. With Gumbel draws of scale s the chance of each is in closed form, seconds ** (-1 / s) over their
sum (McFadden 1974), so the propensity that is logged is the true one. It is free while s is no more than the
prediction's own error, and it stops herding: equals share what argmin gives to the first.

Paid exploration goes further: a small share of those with slack to spare takes any endpoint that still makes it
with room. What is in flight counts by itself: it stands in the predicted seconds.
"""

import numpy as np

from scheduler.state import Bools, Floats

CHANCE_MIN = 0.005
"Less likely candidates are not drawn at all: a propensity near 0 would rule every estimate made from the log."

PAID_MARGIN = 2.0
"Who explores for pay is promised its first token no sooner than in so many times the predicted seconds."


def chances(seconds: Floats, *, scale: float) -> Floats:
    """With what chance each candidate's draw is the smallest; 0 where it may not go.

    Args:
        seconds: float64[n], above 0, or `inf`.
        scale: of the draws, in log seconds; about the relative error of a prediction.

    >>> chances(np.array([1.0, 1.0, np.inf]), scale=0.05)
    array([0.5, 0.5, 0. ])
    """
    with np.errstate(divide="ignore"):
        logs = -np.log(np.maximum(seconds, 1e-9)) / scale
    found: Floats = np.exp(logs - logs.max())
    found[found < CHANCE_MIN * found.sum()] = 0.0
    found /= found.sum()
    return found


def paid(chances: Floats, seconds: Floats, open_: Bools, *, left_s: float, share: float) -> Floats:
    """The same chances with a share kept for any endpoint that makes a promise with room.

    Args:
        chances: float64[n], as above.
        seconds: float64[n] to the first token.
        open_: where it could start now.
        left_s: until it is due; `inf`, where nothing was promised, pays for nobody's curiosity.
        share: of these requests that explore.
    """
    if not np.isfinite(left_s) or share <= 0:
        return chances
    payable = open_ & (seconds * PAID_MARGIN <= left_s)
    count = int(payable.sum())
    if count < 2:
        return chances
    mixed: Floats = (1.0 - share) * chances + share * payable / count
    return mixed


def drawn(chances: Floats, uniform: float) -> int:
    """The candidate that a uniform draw from [0, 1) stands for."""
    edges = np.cumsum(chances)
    at = int(np.searchsorted(edges, uniform * edges[-1], side="right"))
    return min(at, int(np.flatnonzero(chances)[-1]))
