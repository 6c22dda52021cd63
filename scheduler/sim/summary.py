"""What a workload looks like in a dozen numbers."""

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from scheduler.sim.workload import Arrival, rate

QUANTILES = (0.1, 0.5, 0.9, 0.99)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and quantiles of one length, in tokens."""

    mean: float
    p10: float
    p50: float
    p90: float
    p99: float
    most: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One workload at a glance."""

    rows: int
    duration_s: float
    "From the first arrival to the last."

    rate_per_s: float
    arrival_cv: float | None
    "Standard deviation of the gaps over their mean: 1 is Poisson; None below three rows."

    prompt_tokens: Spread | None
    "None where there are no rows."

    output_tokens: Spread | None
    sessions: int
    "Conversations; rows without one are not counted."

    prefix_share: float
    "Part of all prompt tokens that an endless cache would have served, 0 to 1."

    clients: dict[str, int]
    "Rows by client, the busiest first."


def summary(arrivals: Sequence[Arrival]) -> Summary:
    """The numbers of a workload in order of time.

    >>> summary([Arrival(at_s=0.0, prompt_tokens=8, output_tokens=2)]).prompt_tokens.p50
    8.0
    """
    gaps_s = np.diff([a.at_s for a in arrivals])
    has_cv = len(gaps_s) > 1 and gaps_s.mean() > 0
    counts = Counter(a.client for a in arrivals if a.client)
    return Summary(
        rows=len(arrivals),
        duration_s=arrivals[-1].at_s - arrivals[0].at_s if arrivals else 0.0,
        rate_per_s=rate(arrivals),
        arrival_cv=float(gaps_s.std() / gaps_s.mean()) if has_cv else None,
        prompt_tokens=_spread([a.prompt_tokens for a in arrivals]),
        output_tokens=_spread([a.output_tokens for a in arrivals]),
        sessions=len({a.session for a in arrivals if a.session is not None}),
        prefix_share=prefix_share(arrivals),
        clients=dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))),
    )


def prefix_share(arrivals: Sequence[Arrival]) -> float:
    """Prompt tokens whose block an earlier row had at the same position, as a part of all."""
    seen: set[tuple[int, int]] = set()
    hit = total = 0
    for a in arrivals:
        cached = 0
        while cached < len(a.blocks) and (cached, a.blocks[cached]) in seen:
            cached += 1
        hit += min(cached * a.block_tokens, a.prompt_tokens)
        total += a.prompt_tokens
        seen.update(enumerate(a.blocks))
    return hit / total if total else 0.0


def _spread(tokens: Sequence[int]) -> Spread | None:
    if not tokens:
        return None
    p10, p50, p90, p99 = (float(q) for q in np.quantile(tokens, QUANTILES))
    return Spread(
        mean=float(np.mean(tokens)), p10=p10, p50=p50, p90=p90, p99=p99, most=float(max(tokens))
    )
