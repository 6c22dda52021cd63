"""What the lab and the real system are compared on: three cells, and the policies that play them.

Rates and promises are those of GPU seconds on twelve endpoints; `arrivals` makes them slower, and fewer for fewer.
"""

import msgspec
import numpy as np
from msgspec import structs

from scheduler.sim import generate
from scheduler.sim.generate import Arrivals, Lengths, Work
from scheduler.sim.workload import Promise, Workload

ENDPOINTS = 12
"The fleet that rates are for."

SEED = 0
"Of the workloads."

BLOCK_TOKENS = 128
"Both engines and dispatchers find a shared beginning exactly where the workload has it."

POLICIES = {
    "plan": "",
    "core-fcfs": '[policy]\nname = "fcfs"\n',
    "core-edf": '[policy]\nname = "edf"\n',
    "round-robin": '[profile.picker]\nname = "round-robin-picker"\n',
    "least-request": """
[profile]
scorers = [{name = "running-requests-size-scorer"}]
picker = {name = "max-score-picker"}
""",
}
"The dispatcher's settings by a policy's name. The lab knows the first three; what has a `[profile]` is `plan` on that."


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A workload, and who plays it."""

    mix: tuple[Work, ...]
    policies: tuple[str, ...]


def _documents(*, rate_rps: float, count: int, tokens: int) -> tuple[Work, ...]:
    """Short questions on long documents, some of which are asked about more often: by Zipf's law, to the power 0.8."""
    often = 1 / np.arange(1, count + 1) ** 0.8
    return tuple(
        Work(
            name=f"document-{at}",
            arrivals=Arrivals(rate_per_s=rate_rps * float(share)),
            prompt=Lengths(
                points=((0.5, tokens + 200), (0.9, tokens + 500)),
                least=tokens + 16,
                most=tokens + 1000,
            ),
            output=Lengths(points=((0.5, 40), (0.9, 100)), least=8, most=200),
            promise=Promise(ttft_s=0.5),
            shared_tokens=tokens,
        )
        for at, share in enumerate(often / often.sum())
    )


def _code(name: str, *, rate_rps: float, ttft_s: float) -> Work:
    """Azure's code completions: all prefill. The longest answers are cut, or one of them would be most of a run."""
    return Work(
        name=name,
        arrivals=Arrivals(rate_per_s=rate_rps),
        prompt=generate.AZURE_CODE_PROMPT,
        output=structs.replace(generate.AZURE_CODE_OUTPUT, most=100),
        promise=Promise(ttft_s=ttft_s),
    )


def _chat(*, rate_rps: float, ttft_s: float, tpot_s: float) -> Work:
    """Azure's conversations, with shorter answers."""
    return Work(
        name="chat",
        arrivals=Arrivals(rate_per_s=rate_rps),
        prompt=generate.AZURE_CHAT_PROMPT,
        output=Lengths(points=((0.5, 100), (0.9, 200)), least=16, most=300),
        promise=Promise(ttft_s=ttft_s, tpot_s=tpot_s),
    )


CELLS = {
    "routing": Cell(
        mix=_documents(rate_rps=35.0, count=40, tokens=3072),
        policies=("plan", "least-request", "round-robin"),
    ),
    "order": Cell(
        mix=(
            _code("urgent", rate_rps=35.0, ttft_s=0.7),
            _code("patient", rate_rps=35.0, ttft_s=3.0),
        ),
        policies=("plan", "core-edf", "core-fcfs"),
    ),
    "pace": Cell(
        mix=(_chat(rate_rps=52.0, ttft_s=1.0, tpot_s=0.04),),
        policies=("plan", "core-fcfs", "least-request"),
    ),
}
"""
Where prompts share beginnings and one half of the endpoints is twice as fast; where prefill is short and promises are of
two lengths; where a batch that grows breaks a promised pace.
"""


def arrivals(cell: Cell, *, endpoints: int, slower: float, span_s: float) -> Workload:
    """So many wall seconds of a cell, in wall seconds, promises included."""
    thinner = tuple(
        structs.replace(
            work,
            arrivals=Arrivals(rate_per_s=work.arrivals.rate_per_s * endpoints / ENDPOINTS),
        )
        for work in cell.mix
    )
    rows = generate.generated(
        thinner,
        duration_s=span_s / slower,
        rng=np.random.default_rng(SEED),
        block_tokens=BLOCK_TOKENS,
    )
    return tuple(
        structs.replace(
            row,
            at_s=slower * (row.at_s - rows[0].at_s),
            ttft_s=_slower(row.ttft_s, slower),
            tpot_s=_slower(row.tpot_s, slower),
        )
        for row in rows
    )


def _slower(promise_s: float | None, factor: float) -> float | None:
    return None if promise_s is None else promise_s * factor
