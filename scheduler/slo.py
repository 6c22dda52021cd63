"""What a request was promised, and what is left of it.

A promise comes from a named objective, part by part overridden by the request's own fields. Its clock starts at
the enqueue and is never wound back: a retry keeps its arrival.
"""

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from scheduler.errors import WireError
from scheduler.fairness import Weight
from scheduler.wire.client import Request
from scheduler.wire.words import PRIORITY_MAX

Milliseconds = Annotated[float, Meta(gt=0, le=1e12)]
"Up to thirty years, as settings in seconds."

BYTES_PER_TOKEN = 4
"English text in a GPT-like vocabulary: 3.5 to 4.5 bytes a token; the body's JSON makes up for the difference."

NO_PROMISE = math.inf
"When a request without promise is due."


class Objective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A promise with a name, so that clients need not repeat it. In milliseconds, as on the wire."""

    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0
    "Higher first. Below 0 it may be shed: with `waiting_max` requests in line it makes room for one of 0 or more."

    ttft_ms: Milliseconds | None = None
    "Time to first token, from the enqueue."

    tpot_ms: Milliseconds | None = None
    "Mean time per output token after the first."

    deadline_ms: Milliseconds | None = None
    "The whole answer, from the enqueue; past it the request expires."

    weight: Weight = 1.0
    "What keeping this promise is worth beside the others when not all can be kept."

    max_queue_ms: Milliseconds | None = None
    "A request that still has no endpoint after this long is rejected; absent: it waits."


_UNNAMED = Objective()


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """One request's promise, in seconds and moments."""

    ttft_s: float | None
    "To the first token, from the enqueue."

    tpot_s: float | None
    "Per output token after the first."

    deadline_at: float | None
    "After this moment it expires."

    priority: int
    "Higher first."

    weight: float
    "Worth of keeping it."

    refuse_at: float | None
    "Still without an endpoint at this moment, it is rejected."


def promise(request: Request, enqueued_at: float, objectives: Mapping[str, Objective]) -> Promise:
    """The request's named objective with its explicit fields laid over it.

    Raises:
        WireError: the objective is not among the settings' own; names it and what exists.

    >>> chat = {"chat": Objective(ttft_ms=500, tpot_ms=50)}
    >>> promise(Request(model="m", objective="chat", tpot_s=0.02), 100.0, chat).tpot_s
    0.02
    """
    if request.objective and request.objective not in objectives:
        known = ", ".join(sorted(objectives)) or "none is set"
        raise WireError(f"field 'objective' is {request.objective!r}, wanted one of: {known}")
    named = objectives.get(request.objective, _UNNAMED)
    deadline_s = _first(request.deadline_s, _seconds(named.deadline_ms))
    queue_s = _earlier(request.max_queue_s, _seconds(named.max_queue_ms))
    return Promise(
        ttft_s=_first(request.ttft_s, _seconds(named.ttft_ms)),
        tpot_s=_first(request.tpot_s, _seconds(named.tpot_ms)),
        deadline_at=_earlier(
            request.deadline_at, None if deadline_s is None else enqueued_at + deadline_s
        ),
        priority=named.priority if request.priority is None else request.priority,
        weight=named.weight,
        refuse_at=None if queue_s is None else enqueued_at + queue_s,
    )


def due_at(kept: Promise, enqueued_at: float, decode_s: float) -> float:
    """The moment by which the first token must be there; `inf` where nothing was promised.

    Args:
        kept: the promise.
        enqueued_at: when its clock started.
        decode_s: predicted seconds from the first token to the last. At most half of a deadline is set apart
            for it, so that a poor guess of the length cannot make a young request look lost.
    """
    due_at = NO_PROMISE if kept.ttft_s is None else enqueued_at + kept.ttft_s
    if kept.deadline_at is None:
        return due_at
    return min(due_at, kept.deadline_at - min(decode_s, 0.5 * (kept.deadline_at - enqueued_at)))


def prompt_tokens(request: Request, usual: int) -> int:
    """The prompt's length: as the client says, else from the body's bytes, else (a claim check) the usual one."""
    if request.prompt_tokens is not None:
        return request.prompt_tokens
    return max(1, len(request.body) // BYTES_PER_TOKEN) if request.body else usual


def _first(explicit: float | None, named: float | None) -> float | None:
    return named if explicit is None else explicit


def _earlier(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
