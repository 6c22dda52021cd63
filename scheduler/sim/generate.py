"""Workloads from laws: arrivals, lengths, conversations, promises.

A `Work` is one kind of work: how often it comes, how long its prompts and outputs are, how
its sessions go on, what it is promised. A mix of works drawn from one seed is a workload;
adding a work to the end of a mix leaves what the others draw as it was.

The laws hold statistics that others published, each with its source beside it.
"""

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from scheduler.sim.workload import Arrival, Promise, Workload, merged, picked, promised

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ARRIVALS_MAX = 5_000_000
"More than any run here needs; a rate typed with three zeros too many stops here."
TURNS_MAX = 64
"A session ends here whatever chance says."


class Lengths(msgspec.Struct, frozen=True):
    """A law of token counts through quantiles that somebody published.

    Two points make exactly a log-normal. More points bend it: between two, the logarithm
    is linear in the normal score, so a law with two humps fits as well. The end pieces go on
    outside the points, up to `least` and `most`.

    >>> law = Lengths(points=((0.5, 100), (0.9, 1000)), least=1, most=10_000)
    >>> law.draw(np.random.default_rng(7), 3)
    array([100, 171,  61])
    """

    points: tuple[tuple[float, float], ...]
    "(share of requests, tokens), at least two, both rising."

    least: int
    most: int

    def draw(self, rng: np.random.Generator, n: int) -> Ints:
        """int64[n], tokens, each from `least` to `most`."""
        score = np.array([NormalDist().inv_cdf(share) for share, _ in self.points])
        log = np.log([tokens for _, tokens in self.points])
        z = rng.standard_normal(n)
        # The segment each draw falls into; the end segments are extended.
        left = np.clip(np.searchsorted(score, z) - 1, 0, len(score) - 2)
        slope = np.diff(log) / np.diff(score)
        tokens = np.exp(log[left] + slope[left] * (z - score[left]))
        whole: Ints = np.clip(np.rint(tokens), self.least, self.most).astype(np.int64)
        return whole


class Crowd(msgspec.Struct, frozen=True):
    """A stretch of time in which arrivals come `times` as fast: a flash crowd."""

    start_s: float
    end_s: float
    times: float


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When requests come: a renewal process, with crowds on top.

    Gaps are gamma with mean 1/rate and the coefficient of variation `cv`: 1 is Poisson,
    above 1 comes in bursts. Gamma gaps are what BurstGPT (arXiv 2401.17644) and ServeGen
    (arXiv 2505.09999) fit to production traffic.
    """

    rate_per_s: float
    "Mean requests a second outside crowds, all turns of a session counted."

    cv: float = 1.0
    crowds: tuple[Crowd, ...] = ()
    "In order of time, not overlapping."


class Turns(msgspec.Struct, frozen=True, kw_only=True):
    """How a session goes on after its first request.

    The next prompt is the last prompt, its output and a new message; the number of turns is
    geometric.
    """

    mean: float
    "Mean turns a session, at least 1."

    message: Lengths
    "Tokens of each new message."

    gap: Lengths
    "Whole seconds from one turn's arrival to the next."


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of work in a mix."""

    name: str
    "Becomes `client` of its arrivals."

    arrivals: Arrivals
    prompt: Lengths
    "Of the first turn, the shared prefix included."

    output: Lengths
    promise: Promise
    turns: Turns | None = None
    shared_tokens: int = 0
    "Of a system prompt that starts every prompt of this work."


def generated(
    mix: Sequence[Work], *, duration_s: float, rng: np.random.Generator, block_tokens: int = 64
) -> Workload:
    """A workload from a mix: same seed, same rows.

    Sessions start inside the duration and are cut at its end, so a work with sessions comes
    up to its rate only after about one session's length.

    Raises:
        ValueError: a rate, duration or block size is not positive, or too many rows.

    >>> rows = generated(DEMO, duration_s=60.0, rng=np.random.default_rng(1))
    >>> sorted({row.tenant for row in rows})
    ['archive', 'assistant', 'editor', 'library']
    """
    if not 0 < duration_s < np.inf:
        raise ValueError(f"duration is {duration_s} s, wanted a positive number")
    if block_tokens < 1:
        raise ValueError(f"block is {block_tokens} tokens, wanted at least 1")
    parts = [
        _drawn(work, duration_s, child, block_tokens)
        for work, child in zip(mix, rng.spawn(len(mix)), strict=True)
    ]
    return merged(*parts)


def moments(arrivals: Arrivals, *, duration_s: float, rng: np.random.Generator) -> Floats:
    """float64[n], never falling, whole microseconds in [0, duration_s).

    The gaps are drawn at rate 1 and time is then bent by the integral of the rate, so a
    crowd packs the same process tighter instead of mixing in a second one.

    Raises:
        ValueError: the rate or cv is not positive, or more than ARRIVALS_MAX rows follow.
    """
    if not (arrivals.rate_per_s > 0 and arrivals.cv > 0):
        raise ValueError(
            f"rate is {arrivals.rate_per_s}/s and cv {arrivals.cv}, wanted both above 0"
        )
    clock_s, expected = _bent(arrivals, duration_s)
    if expected[-1] > ARRIVALS_MAX:
        raise ValueError(f"{expected[-1]:.0f} arrivals would follow, wanted at most {ARRIVALS_MAX}")
    shape = 1 / arrivals.cv**2
    chunk = int(expected[-1] * 1.1) + 64
    drawn = np.empty(0)
    while drawn.size == 0 or drawn[-1] < expected[-1]:
        base = drawn[-1] if drawn.size else 0.0
        drawn = np.concatenate([drawn, base + np.cumsum(rng.gamma(shape, 1 / shape, chunk))])
    at_s: Floats = np.interp(drawn[drawn < expected[-1]], expected, clock_s)
    # Whole microseconds: the last bits of a logarithm are the machine's, and files get shorter.
    return np.floor(at_s * 1e6) / 1e6


def replayed(
    pairs: Ints, arrivals: Arrivals, *, duration_s: float, rng: np.random.Generator
) -> Workload:
    """Length pairs (from `trace.lengths`), drawn with replacement, at generated moments."""
    if len(pairs) == 0:
        raise ValueError("0 length pairs, wanted at least 1")
    at_s = moments(arrivals, duration_s=duration_s, rng=rng)
    chosen = pairs[rng.integers(len(pairs), size=len(at_s))]
    return tuple(
        Arrival(at_s=float(at), prompt_tokens=int(prompt), output_tokens=int(output))
        for at, (prompt, output) in zip(at_s, chosen, strict=True)
    )


def _bent(arrivals: Arrivals, duration_s: float) -> tuple[Floats, Floats]:
    """Corners of the integral of the rate: moments, and arrivals expected until then."""
    clock_s, expected = [0.0], [0.0]

    def until(at_s: float, rate_per_s: float) -> None:
        at_s = min(at_s, duration_s)
        if at_s > clock_s[-1]:
            expected.append(expected[-1] + rate_per_s * (at_s - clock_s[-1]))
            clock_s.append(at_s)

    for crowd in arrivals.crowds:
        if not (crowd.times > 0 and crowd.start_s < crowd.end_s):
            raise ValueError(f"{crowd} is no crowd, wanted times > 0 and start < end")
        until(crowd.start_s, arrivals.rate_per_s)
        until(crowd.end_s, arrivals.rate_per_s * crowd.times)
    until(duration_s, arrivals.rate_per_s)
    return np.array(clock_s), np.array(expected)


def _drawn(work: Work, duration_s: float, rng: np.random.Generator, block_tokens: int) -> Workload:
    """The rows of one work, in order of session, then turn; `merged` puts them in time."""
    mean = work.turns.mean if work.turns else 1.0
    starts = structs.replace(work.arrivals, rate_per_s=work.arrivals.rate_per_s / mean)
    at_s = moments(starts, duration_s=duration_s, rng=rng)
    prompts = np.maximum(work.prompt.draw(rng, len(at_s)), work.shared_tokens + 1)
    outputs = work.output.draw(rng, len(at_s))
    n_shared = work.shared_tokens // block_tokens
    rows = [
        Arrival(
            at_s=float(at),
            prompt_tokens=int(prompt),
            output_tokens=int(output),
            blocks=tuple(range(n_shared)),
            block_tokens=block_tokens if n_shared else 0,
            client=work.name,
        )
        for at, prompt, output in zip(at_s, prompts, outputs, strict=True)
    ]
    if work.turns:
        rows = _continued(rows, work, work.turns, rng=rng, block_tokens=block_tokens)
        rows = list(picked(rows, [i for i, row in enumerate(rows) if row.at_s < duration_s]))
    return promised(rows, work.promise)


def _continued(
    firsts: Sequence[Arrival],
    work: Work,
    turns: Turns,
    *,
    rng: np.random.Generator,
    block_tokens: int,
) -> list[Arrival]:
    """Every first request with the rest of its session behind it, blocks filled in.

    Only full blocks get an id, so a turn's ids start with all ids of the turn before.
    """
    n_shared = work.shared_tokens // block_tokens
    next_block = n_shared
    rows: list[Arrival] = []
    for session, first in enumerate(firsts):
        talk = list(_talk(structs.replace(first, session=session), work, turns, rng))
        for turn, row in enumerate(talk):
            n_own = max(0, row.prompt_tokens // block_tokens - n_shared)
            blocks = (*range(n_shared), *range(next_block, next_block + n_own))
            parent = len(rows) - 1 if turn else None
            rows.append(
                structs.replace(row, blocks=blocks, block_tokens=block_tokens, parent=parent)
            )
        next_block += max(0, talk[-1].prompt_tokens // block_tokens - n_shared)
    return rows


def _talk(first: Arrival, work: Work, turns: Turns, rng: np.random.Generator) -> Iterator[Arrival]:
    """One conversation, each prompt holding the last prompt and its answer."""
    n = min(int(rng.geometric(1 / turns.mean)), TURNS_MAX)
    messages = turns.message.draw(rng, n).tolist()
    gaps_s = turns.gap.draw(rng, n).tolist()
    outputs = work.output.draw(rng, n).tolist()
    last = first
    yield last
    for turn in range(1, n):
        prompt = last.prompt_tokens + last.output_tokens + messages[turn]
        if prompt > work.prompt.most:
            return
        last = structs.replace(
            last,
            at_s=round(last.at_s + gaps_s[turn], 6),
            prompt_tokens=prompt,
            output_tokens=outputs[turn],
            turn=turn + 1,
            gap_s=float(gaps_s[turn]),
        )
        yield last


# The medians stand in Splitwise (ISCA 2024, section III): 1,020 prompt and 129 output tokens
# for conversation, 1,500 and 13 for code. The other quantiles are read off the data published
# with it, the Azure LLM inference trace 2023 (CC-BY-4.0).
AZURE_CHAT_PROMPT = Lengths(
    points=(
        (0.05, 181),
        (0.1, 298),
        (0.2, 390),
        (0.35, 431),
        (0.4, 969),
        (0.5, 1020),
        (0.75, 1200),
        (0.82, 1496),
        (0.9, 4075),
        (0.99, 4122),
    ),
    least=2,
    most=14_050,
)
AZURE_CHAT_OUTPUT = Lengths(
    points=(
        (0.01, 16),
        (0.05, 38),
        (0.25, 81),
        (0.4, 102),
        (0.5, 129),
        (0.6, 211),
        (0.65, 377),
        (0.75, 397),
        (0.9, 428),
        (0.99, 611),
    ),
    least=7,
    most=1000,
)
AZURE_CODE_PROMPT = Lengths(
    points=((0.05, 76), (0.25, 577), (0.5, 1500), (0.75, 2695), (0.9, 4995)),
    least=3,
    most=7437,
)
AZURE_CODE_OUTPUT = Lengths(
    points=((0.1, 7), (0.25, 9), (0.5, 13), (0.75, 23), (0.9, 53), (0.99, 237)),
    least=6,
    most=1899,
)

# arXiv summarisation as Sarathi-Serve (OSDI 2024, table 2) prints it: prompts with a median of
# 7,059 and a 90th percentile of 12,985 tokens, outputs with 208 and 371.
ARXIV_PROMPT = Lengths(points=((0.5, 7059), (0.9, 12_985)), least=512, most=16_384)
ARXIV_OUTPUT = Lengths(points=((0.5, 208), (0.9, 371)), least=16, most=2048)

# LMSYS-Chat-1M (ICLR 2024, table 1): 2.0 turns a conversation, 69.5 tokens a message in the
# mean. The log-normal here has that mean; its spread is our choice.
LMSYS_MESSAGE = Lengths(points=((0.5, 29), (0.9, 158)), least=1, most=2048)
LMSYS_TURNS_MEAN = 2.0

# Our choice: a person reads and types for most of a minute.
HUMAN_GAP = Lengths(points=((0.5, 40), (0.9, 180)), least=3, most=1800)

DEMO: tuple[Work, ...] = (
    Work(
        name="chat",
        arrivals=Arrivals(rate_per_s=2.0),
        prompt=AZURE_CHAT_PROMPT,
        output=AZURE_CHAT_OUTPUT,
        promise=Promise(ttft_s=1.0, tpot_s=0.05, priority=1, tenant="assistant"),
        turns=Turns(mean=LMSYS_TURNS_MEAN, message=LMSYS_MESSAGE, gap=HUMAN_GAP),
        shared_tokens=256,
    ),
    Work(
        name="code",
        arrivals=Arrivals(rate_per_s=1.5, cv=3.0),
        prompt=AZURE_CODE_PROMPT,
        output=AZURE_CODE_OUTPUT,
        promise=Promise(ttft_s=0.5, priority=2, tenant="editor"),
    ),
    Work(
        name="summarise",
        arrivals=Arrivals(rate_per_s=0.3),
        prompt=ARXIV_PROMPT,
        output=ARXIV_OUTPUT,
        promise=Promise(ttft_s=5.0, tenant="library"),
    ),
    Work(
        name="batch",
        arrivals=Arrivals(rate_per_s=0.5, cv=2.0),
        prompt=AZURE_CHAT_PROMPT,
        output=AZURE_CHAT_OUTPUT,
        promise=Promise(deadline_s=60.0, priority=-1, tenant="archive"),
        shared_tokens=256,
    ),
)
"""
Four kinds of work that want different things, 4.3 requests a second; `scaled` for more.

Rates and promises are ours. The Azure code trace is far burstier (cv 13.6) than the 3.0 here: a
demo should show bursts and still end in minutes.
"""

MIXES: dict[str, tuple[Work, ...]] = {"demo": DEMO}
"By the name that the command line knows."
