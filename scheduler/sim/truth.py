"""The truth about an engine: what a prompt would take there. Only the oracle is told."""

from collections.abc import Iterable

from scheduler.sim.engine import Engine
from scheduler.sim.fleet import Machine
from scheduler.sim.sequence import Sequence


def prefill_s(
    engine: Engine,
    machine: Machine,
    *,
    prompt_tokens: int,
    keys: list[int],
    entering: Iterable[Sequence],
    n_decodes: int,
) -> float:
    """Seconds of the steps to a prompt's first token: what is before it, and what of it is not cached.

    Args:
        engine: as it stands.
        machine: with the coefficients that it really has.
        prompt_tokens: of the newcomer.
        keys: of its blocks.
        entering: who is admitted and on the way into the engine.
        n_decodes: how many decode beside it.
    """
    settings = machine.settings
    tokens, pairs = engine.prefill_left()
    limit = (prompt_tokens - 1) // settings.block_size if settings.prefix_caching else 0
    cached = engine.kv.match(keys, limit) * settings.block_size
    for sequence in entering:
        tokens += sequence.total_tokens
        pairs += sequence.total_tokens**2 // 2
    own = prompt_tokens - cached
    tokens += own
    pairs += own * cached + own * own // 2
    n_steps = -(-tokens // settings.max_num_batched_tokens)
    a_step_s = machine.actual.step_s(
        n_decodes + 1, tokens // n_steps + n_decodes, pairs // n_steps, engine.decode_context
    )
    return n_steps * a_step_s * engine.durations.slowdown
