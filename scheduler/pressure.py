"""What giving KV away costs those who come later: the first of it next to nothing, and what is there already nothing.

    pressure = (part of the KV in use) ** 3 * (part of the prompt that is not cached)     of who was promised nothing
               (part of the KV in use)                                                    of who was a first token
               (part of the KV in use) * (how near the pace is to what was promised)      of who was a pace

An endpoint's KV is short when more long answers than usual coincide, which in a half empty one they hardly ever do: so
not in proportion to what is in use. A prompt that begins like another's shares its blocks and evicts nobody else's:
so only for what it adds. A promise, though, is broken by a crowded batch long before KV is short: who brings one is
spread evenly. A plan weighs it with `fill`, in seconds.
"""

from scheduler.state import Floats

AT_EASE, PRESSED = 0.5, 0.75
"Of the promised seconds per token, the part up to which nobody is pressed, and from which on everybody is."


def pressed(pace_s: float, promised_s: float) -> float:
    """How near a pool is to breaking a promise per token: 0 at ease, 1 where its usual answer needs three quarters of it.

    Of the pool and not of each endpoint: one that is slow by nature is not crowded by it.

    Args:
        pace_s: seconds per token there, in the mean.
        promised_s: the same, as promised to whoever was promised the fewest: who crowds breaks the promises of others.

    >>> pressed(0.02, 0.05), pressed(0.025, 0.04), pressed(0.035, 0.04)
    (0.0, 0.5, 1.0)
    """
    return min(1.0, max(0.0, (pace_s / promised_s - AT_EASE) / (PRESSED - AT_EASE)))


def pressure(used: Floats, new: Floats | None, *, is_promised: bool, near: float = 1.0) -> Floats:
    """From 0, where nothing is in use or nothing is added, to 1; float64[n_slots].

    Args:
        used: float64[n_slots], the part of the KV in use.
        new: float64[n_slots], the part of the prompt that is not cached; None: nobody has any of it.
        is_promised: whether it was promised a first token or a pace.
        near: of who was promised something, how near that is to breaking, 0 to 1; see `pressed`.

    >>> import numpy as np
    >>> pressure(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.25, 1.0]), is_promised=False)
    array([0.125  , 0.03125, 1.     ])
    """
    if is_promised:
        return used if near == 1.0 else used * near
    cube: Floats = used**3
    return cube if new is None else cube * new
