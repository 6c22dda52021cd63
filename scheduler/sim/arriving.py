"""Arrivals made ready for runs: what their clients write, and what keeping their promises is worth."""

from collections.abc import Sequence

import msgspec
from msgspec import structs

from scheduler.prefix import BLOCK_TOKENS
from scheduler.sim import chain
from scheduler.sim.workload import Arrival
from scheduler.wire.client import Request

MODEL = "llm"
"What arrivals ask for, and endpoints serve, where nobody says otherwise."


class Row(msgspec.Struct, frozen=True):
    """An arrival, made ready for runs: what its client writes and what keeping its promise is worth."""

    arrival: Arrival
    request: Request
    weight: float = 1.0
    cancel_s: float | None = None
    "Seconds after its enqueue at which its client gives up; None: it waits."
    block_tokens: int = BLOCK_TOKENS
    "The engine's tokens in each of the request's blocks."


def rows(
    arrivals: Sequence[Arrival],
    weights: Sequence[float] = (),
    objectives: Sequence[str] = (),
    asked: Sequence[Request] = (),
    cancels_s: Sequence[float | None] = (),
) -> tuple[Row, ...]:
    """A workload as requests.

    Args:
        arrivals: in order of time.
        weights: of each one's promise; absent: all alike.
        objectives: those whose weight the dispatcher should know, by name.
        asked: how each one's client wrote it, for all that an arrival does not say; absent: it knows the prompt.
        cancels_s: how long after its enqueue each one's client gives up, None where it waits; absent: all wait.
    """
    return tuple(
        Row(
            arrival,
            structs.replace(
                asked[at] if asked else _plain(arrival),
                id=str(at),
                objective=objectives[at] if objectives else "",
                ttft_s=arrival.ttft_s,
                tpot_s=arrival.tpot_s,
                deadline_s=arrival.deadline_s,
                priority=arrival.priority or None,
                tenant=arrival.tenant,
                expected_tokens=arrival.expected_tokens,
            ),
            weights[at] if weights else 1.0,
            cancels_s[at] if cancels_s else None,
            arrival.block_tokens if asked else BLOCK_TOKENS,
        )
        for at, arrival in enumerate(arrivals)
    )


def _plain(arrival: Arrival) -> Request:
    return Request(
        model=MODEL,
        session="" if arrival.session is None else str(arrival.session),
        prompt_tokens=arrival.prompt_tokens,
        blocks=chain.hashes(arrival),
    )
