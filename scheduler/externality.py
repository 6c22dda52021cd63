"""What taking an endpoint's time costs others: those whom a request joins there, and those to come.

    others_s = seconds of a step's part of it * how many it joins + seconds of it that are needless

An engine computes what stands before it in one step: whoever was handed over a moment ago has its first token only when
the newcomer's prompt, or as much of it as goes into a step, is computed as well. And what is cached elsewhere keeps
whoever comes next waiting once more where it is computed anew, and takes the place of what others come back for. A plan
weighs it with `externality`.
"""

import numpy as np

from scheduler.state import Floats

STEP_TOKENS = 2048.0
"What an engine computes in one step, where vLLM is not told otherwise; more comes in parts, and only the first joins."


def others_s(prompt: float, work_s: Floats, new: Floats | None, joined: Floats) -> Floats:
    """Seconds that a choice costs others; float64[n_slots].

    Args:
        prompt: its tokens.
        work_s: float64[n_slots], the prefill's own seconds there.
        new: float64[n_slots], the part of the prompt that is not cached there; None: nobody has any of it.
        joined: float64[n_slots], how many there are still to begin.

    >>> others_s(1000.0, np.array([0.1, 0.1, 0.2]), np.array([0.5, 0.5, 1.0]), np.array([0.0, 2.0, 0.0]))
    array([0. , 0.2, 0.1])
    """
    if new is None:
        alike: Floats = work_s * (joined * min(1.0, STEP_TOKENS / prompt))
        return alike
    if prompt > STEP_TOKENS:
        joined = joined * np.minimum(1.0, STEP_TOKENS / (prompt * new))
    needless = 1.0 - new[new.argmin()] / new
    found: Floats = work_s * (joined + needless)
    return found
