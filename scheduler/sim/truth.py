"""The truth about an engine: what a prompt would find and take there. Only the oracle and reports are told."""

from collections.abc import Iterable, Sequence

from scheduler.sim import chain
from scheduler.sim.engine import Engine
from scheduler.sim.fleet import Machine
from scheduler.sim.sequence import Sequence as Prompt
from scheduler.sim.workload import Arrival


def cached_tokens(engine: Engine, *, prompt_tokens: int, keys: list[int]) -> int:
    """How much of a prompt with these keys stands in its cache; never all, for something must be computed."""
    settings = engine.settings
    limit = (prompt_tokens - 1) // settings.block_size if settings.prefix_caching else 0
    return engine.kv.match(keys, limit) * settings.block_size


def best_cached_tokens(engines: Sequence[Engine], arrival: Arrival) -> int:
    """How much of a prompt the fullest of these caches for it holds; 0 where there is none."""
    sizes = dict.fromkeys(engine.settings.block_size for engine in engines)
    keys = {size: chain.keys(arrival, size) for size in sizes}
    prompt_tokens = arrival.prompt_tokens
    return max(
        (
            cached_tokens(
                engine, prompt_tokens=prompt_tokens, keys=keys[engine.settings.block_size]
            )
            for engine in engines
        ),
        default=0,
    )


def prefill_s(
    engine: Engine,
    machine: Machine,
    *,
    prompt_tokens: int,
    keys: list[int],
    entering: Iterable[Prompt],
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
    cached = cached_tokens(engine, prompt_tokens=prompt_tokens, keys=keys)
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
