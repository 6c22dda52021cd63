"""A trace's prefix blocks in the two forms that others want: an engine's keys and the wire's hashes.

A trace names a block by a number that stands for everything up to its end. Whoever cuts the same prompt into
blocks of another size may share one of them only where the trace's block that holds its last token is shared.
"""

from scheduler.prefix import BLOCK_TOKENS
from scheduler.sim.workload import Arrival
from scheduler.wire.words import BLOCKS_MAX


def keys(arrival: Arrival, block_tokens: int) -> list[int]:
    """The keys of the prompt's full blocks of `block_tokens`, for `Sequence`.

    >>> keys(Arrival(at_s=0, prompt_tokens=9, output_tokens=1, blocks=(7, 9), block_tokens=6), 3)
    [14, 15, 18]
    """
    size = arrival.block_tokens
    if not size:
        return []
    a_block = -(-size // block_tokens)
    n_full = min(arrival.prompt_tokens, len(arrival.blocks) * size) // block_tokens
    if size % block_tokens == 0:
        first = [block * a_block for block in arrival.blocks]
        return [key + part for key in first for part in range(a_block)][:n_full]
    blocks = arrival.blocks
    return [
        blocks[(at * block_tokens + block_tokens - 1) // size] * a_block + at % a_block
        for at in range(n_full)
    ]


def hashes(arrival: Arrival) -> tuple[str, ...]:
    """What a client would write into `blocks`: equal text for equal beginnings."""
    return tuple(f"{key:x}" for key in keys(arrival, BLOCK_TOKENS)[:BLOCKS_MAX])
