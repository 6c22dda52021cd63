"""Workloads as an experiment wants them: other blocks, shorter prompts, groups that share, several traces at once.

As in `workload`, rows are changed, cut or thinned, and never invented; what a cell asks for beyond the trace is said
in its name.
"""

from collections.abc import Sequence

import numpy as np
from msgspec import structs

from scheduler.sim import workload
from scheduler.sim.workload import Arrival, Workload

GROUP_BLOCK = 16
"Tokens in a block of a prefix that `grouped` makes: vLLM's own size."

GROUP_SEED = 0
"Draws who is in which group: the same in every run."


def reblocked(arrivals: Sequence[Arrival], block_tokens: int) -> Workload:
    """The same sharing with blocks of another length: prompts shrink or grow with their blocks.

    Lodestar's cells, for one, take Mooncake's blocks of 512 tokens as 50.

    >>> row = Arrival(at_s=0, prompt_tokens=1024, output_tokens=1, blocks=(0, 1), block_tokens=512)
    >>> reblocked([row], 50)[0].prompt_tokens
    100
    """
    return tuple(
        structs.replace(
            a,
            prompt_tokens=max(1, round(a.prompt_tokens * block_tokens / a.block_tokens)),
            block_tokens=block_tokens,
        )
        if a.block_tokens
        else a
        for a in arrivals
    )


def trimmed(
    arrivals: Sequence[Arrival], *, prompt_max: int | None = None, output_scale: float = 1.0
) -> Workload:
    """Prompts cut at their end to `prompt_max` tokens, outputs multiplied; never below one token."""
    found = []
    for a in arrivals:
        prompt = a.prompt_tokens if prompt_max is None else min(a.prompt_tokens, prompt_max)
        n_blocks = -(-prompt // a.block_tokens) if a.block_tokens else 0
        found.append(
            structs.replace(
                a,
                prompt_tokens=prompt,
                output_tokens=max(1, round(a.output_tokens * output_scale)),
                blocks=a.blocks[:n_blocks],
            )
        )
    return tuple(found)


def grouped(arrivals: Sequence[Arrival], *, groups: int, share: float) -> Workload:
    """Each row in a group whose prompts begin alike for `share` of their tokens; what a trace shared before is lost.

    Lodestar's synthetic cells: so many applications, each with an instruction before every question.

    >>> row = Arrival(at_s=0, prompt_tokens=320, output_tokens=1)
    >>> grouped([row], groups=1, share=0.5)[0].blocks
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """
    chosen = np.random.default_rng(GROUP_SEED).integers(groups, size=len(arrivals)).tolist()
    longest = max((a.prompt_tokens for a in arrivals), default=0) // GROUP_BLOCK + 1
    found = []
    for a, group in zip(arrivals, chosen, strict=True):
        first = group * longest
        n_blocks = int(share * a.prompt_tokens) // GROUP_BLOCK
        blocks = tuple(range(first, first + n_blocks))
        found.append(structs.replace(a, blocks=blocks, block_tokens=GROUP_BLOCK))
    return tuple(found)


def mixed(
    parts: Sequence[tuple[Sequence[Arrival], float]], *, start_s: float, window_s: float
) -> Workload:
    """Several traces at once, each with its share of all requests, from `start_s` of each for `window_s` of the mix.

    Each is slowed down until the shares are right, never sped up: the mix's rate is the highest at which no trace
    needs more of its own time than the window has. A lone part is just cut.

    Raises:
        ValueError: a share that is not positive, or a part without a rate.
    """
    rates = [workload.rate(arrivals) for arrivals, _ in parts]
    if any(share <= 0 for _, share in parts) or not all(rates):
        raise ValueError("each part wants a share above 0, and arrivals over some time")
    total = min(rate / share for rate, (_, share) in zip(rates, parts, strict=True))
    moved = []
    for rate, (arrivals, share) in zip(rates, parts, strict=True):
        speed = min(1.0, share * total / rate)
        cut = workload.sliced(arrivals, start_s, start_s + window_s * speed)
        moved.append(workload.scaled(cut, factor=speed) if speed < 1.0 else cut)
    return workload.merged(*moved) if len(moved) > 1 else moved[0]


def crowded(arrivals: Sequence[Arrival], begin_s: float, seconds: float, times: float) -> Workload:
    """A flash crowd: the rows of `seconds * times` from `begin_s` come within `seconds`; what follows comes sooner.

    >>> rows = [Arrival(at_s=float(at), prompt_tokens=1, output_tokens=1) for at in range(6)]
    >>> [row.at_s for row in crowded(rows, 1.0, 2.0, 2.0)]
    [0.0, 1.0, 1.5, 2.0, 2.5, 3.0]
    """
    long_s = seconds * times

    def moved(at_s: float) -> float:
        within_s = min(max(0.0, at_s - begin_s), long_s)
        return at_s - within_s + within_s / times

    return tuple(structs.replace(a, at_s=moved(a.at_s)) for a in arrivals)
