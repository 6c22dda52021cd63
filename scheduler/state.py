"""Who is who in the core: a `Ticket` for each living request, an `Endpoint` for each living server.

Both are plain records with one owner, the `Scheduler`. A ticket changes its state only through the lifecycle's
table, so a transition that must not happen raises instead of happening.
"""

import math
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from scheduler import lifecycle
from scheduler.lifecycle import State, Transition
from scheduler.slo import Promise
from scheduler.wire.client import Request
from scheduler.wire.words import Leg
from scheduler.wire.worker import Beat

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]


REST_S, REST_MAX_S = 0.25, 5.0
"""How long an endpoint that hands a job back takes nothing new: first, and at most.

An engine that answers 429 or 503 says no within milliseconds: without a rest it would use up all attempts of all
that wait before it is well again.
"""


class Kept(msgspec.Struct, kw_only=True, eq=False):
    """A prompt's KV, on the endpoint that computed it."""

    endpoint: str
    epoch: int
    tokens: float
    params: bytes
    "The engine's `kv_transfer_params`: opaque."
    cached_tokens: int | None
    "Of the prompt, as the engine found them in its cache; None where it does not say."
    until_at: float
    "Its lease, or rather a little less."
    patient_until_at: float
    "Until then its request may wait for an endpoint where its pace is kept."
    target: str = ""
    "Who fetches it; empty: nobody yet."


class Ticket(msgspec.Struct, kw_only=True, eq=False):
    """A living request, from reading to its terminal record."""

    request: Request
    "As its client wrote it."

    entry: str
    "Its entry in `requests`."

    enqueued_at: float
    "When its promise's clock started."

    promise: Promise
    "What it was promised."

    prompt_tokens: int
    "The prompt's length, said or estimated."

    output_tokens: int
    "How long answers usually are; never the true length, which no server knows (I7)."

    due_at: float
    "When its first token must be there; `inf` without promise."

    rank: float
    "The policy's place for it: smaller runs first. Fixed while it waits."

    max_attempts: int
    "How often it may be tried."

    state: State = "queued"
    "Where in its life it is."

    attempt: int = 0
    "How often it was assigned."

    forgiven: int = 0
    "Attempts lost before an engine had it, at most FORGIVEN_MAX: they say nothing about the request."

    endpoint: str = ""
    "Who holds it, while assigned or running."

    leg: Leg = "whole"
    "Which part of it was last assigned."

    handovers: int = 0
    "Prefill legs that did their part: they were assigned, and were no attempt that failed."

    computed_tokens: int = 0
    "Of its prompt, what its prefill leg computed; its decode leg finds all of it."

    cached_tokens: int = 0
    "Prefix believed cached at the last assignment."

    session_tokens: int = 0
    "Of its session, at most there at the last assignment; for a request without blocks."

    pace: tuple[float, ...] = ()
    "What decoding cost where it went, in the terms of `pace`, when it was assigned."

    features: tuple[str, ...] = ()
    "What the predictor saw when it was assigned; empty where an earlier leader did that."

    predicted_s: float = 0.0
    "To its first token from then, with them."

    seen_attempt: int = 0
    "Whose first token has taught the predictor; 0: none."

    waits_for_pace: bool = False
    "While it waits: there would be time for it, but nowhere a pace that it does not break."

    handed_at: float = 0.0
    "When it was last handed over."

    missed_at: float | None = None
    "Since when its worker says that it does not have it; None: it has not said so."

    charged: float = 0.0
    "Tokens of service for which its tenant was charged, where tenants share."

    turn_at: float = -math.inf
    "From when it needs its tenant's turn, where tenants share, unix seconds; until then it lets others pass."

    is_settled: bool = False
    "Its tenant's account was told whether its promise is kept."

    is_cancelled: bool = False
    "Somebody cancelled it while a worker held it: it must not be tried again."

    id: str = ""
    "The request's; kept here, as it is asked for a dozen times a step."

    order: tuple[float, float, str] = (0.0, 0.0, "")
    "Its place in line: the policy's rank, ties to the older, then by id."

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.order = self.rank, self.enqueued_at, self.id

    @property
    def is_held(self) -> bool:
        """Whether some worker holds it."""
        return self.state in ("assigned", "running")

    @property
    def is_spent(self) -> bool:
        """Whether it has had all its attempts."""
        return self.attempt >= self.attempts_allowed

    @property
    def attempts_allowed(self) -> int:
        """As asked for, those forgiven, and a prefill leg for each that was handed over."""
        return self.max_attempts + self.forgiven + self.handovers

    def transition(self, transition: Transition) -> None:
        """Take a transition of the lifecycle; one that is not in its table is a bug."""
        self.state = lifecycle.after(self.state, transition)


class Endpoint(msgspec.Struct, kw_only=True, eq=False):
    """A living server as its worker's beats describe it."""

    name: str
    "As it calls itself."

    slot: int
    "Its column in every array of the core, for as long as it lives."

    beat: Beat
    "The latest."

    seen_at: float
    "When the latest beat was received."

    away_at: float | None = None
    "Since when its engine is away; None while it is there."

    is_drained: bool = False
    "A person asked that it take no new work."

    returns: int = 0
    "Jobs it has handed back since it last completed one."

    rests_until: float = 0.0
    "It takes nothing new before."

    held: dict[str, Ticket]
    "What it was assigned and has not finished, oldest first."

    @property
    def epoch(self) -> int:
        """Its worker's life; what an older one held is lost."""
        return self.beat.epoch

    @property
    def takes_work(self) -> bool:
        """Whether anything new may go there."""
        return self.beat.state == "ready" and not self.is_drained

    def rest(self, now: float) -> None:
        """It handed a job back: give it time, twice as much each time in a row."""
        if now < self.rests_until:
            return  # of the same burst
        self.rests_until = now + min(REST_MAX_S, REST_S * 2**self.returns)
        self.returns = min(self.returns + 1, 16)

    def lost_at(self, lease_s: float) -> float:
        """When what it holds goes back, unless it is heard from before."""
        seen = self.seen_at if self.away_at is None else min(self.seen_at, self.away_at)
        return seen + lease_s
