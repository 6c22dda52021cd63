"""What giving KV away costs those who come later: the first of it next to nothing, and what is there already nothing.

    pressure = (part of the KV in use) ** 3 * (part of the prompt that is not cached)     of who was promised nothing
               (part of the KV in use)                                                    of who was

An endpoint's KV is short when more long answers than usual coincide, which in a half empty one they hardly ever do: so
not in proportion to what is in use. A prompt that begins like another's shares its blocks and evicts nobody else's:
so only for what it adds. A promise, though, is broken by a crowded batch long before KV is short: who brings one is
spread evenly. A plan weighs it with `fill`, in seconds.
"""

from scheduler.state import Floats


def pressure(used: Floats, new: Floats | None, *, is_promised: bool) -> Floats:
    """From 0, where nothing is in use or nothing is added, to 1; float64[n_slots].

    Args:
        used: float64[n_slots], the part of the KV in use.
        new: float64[n_slots], the part of the prompt that is not cached; None: nobody has any of it.
        is_promised: whether it was promised a first token or a pace.

    >>> import numpy as np
    >>> pressure(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.25, 1.0]), is_promised=False)
    array([0.125  , 0.03125, 1.     ])
    """
    if is_promised:
        return used
    cube: Floats = used**3
    return cube if new is None else cube * new
