"""Arrivals made ready for runs: what their clients write, and what keeping their promises is worth."""

from collections.abc import Sequence

import msgspec
from msgspec import structs

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


def rows(
    arrivals: Sequence[Arrival],
    weights: Sequence[float] = (),
    objectives: Sequence[str] = (),
    asked: Sequence[Request] = (),
) -> tuple[Row, ...]:
    """A workload as requests.

    Args:
        arrivals: in order of time.
        weights: of each one's promise; absent: all alike.
        objectives: those whose weight the dispatcher should know, by name.
        asked: how each one's client wrote it, for all that an arrival does not say; absent: it knows the prompt.
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
