"""What the core is told and what it asks for: its whole outside world.

Events are facts; the wire's own `Beat`, `Reward` and `Control` are events as they stand. The driver carries
commands out in order, and tells the core (`Refused`) what Redis would not accept.
"""

from collections.abc import Callable

import msgspec

from scheduler.wire.client import Control, Request
from scheduler.wire.dispatcher import Decision, Job
from scheduler.wire.words import Leg
from scheduler.wire.worker import Beat, Result, Reward


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """A request was read from `requests`."""

    request: Request
    "As decoded and checked; its id is filled in."

    entry: str
    "Its entry id in `requests`."

    enqueued_at: float
    "The entry id's milliseconds, as unix seconds: the promise's clock started here."


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """A request that an earlier leader had read and that is not terminal yet."""

    request: Request
    "As in `Arrived`."

    entry: str
    "As in `Arrived`."

    enqueued_at: float
    "As in `Arrived`."

    attempt: int = 0
    "Attempts so far."

    endpoint: str = ""
    "Where it is assigned now; empty: it waits."

    epoch: int = 0
    "That endpoint's epoch at the assignment."

    leg: Leg = "whole"
    "Which part of it was last assigned."

    handovers: int = 0
    "Prefill legs that did their part."

    prefilled: Reward | None = None
    "Where it waits between two legs: what the first said, and with it where the KV is."

    cancelled: bool = False
    "Its tombstone is set."


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Redis refused a move of this request: it is a duplicate, or already terminal. The core forgets it."""

    id: str
    "The request."

    entry: str
    "Which entry of it; a living request of the same id under another entry stays."

    reason: str = ""
    "In words."


Event = Arrived | Recovered | Refused | Beat | Reward | Control


class Assign:
    """Append this job to the endpoint's stream, in one fenced move; log the decision when there is time for it."""

    __slots__ = "_decision", "_explain", "endpoint", "job"

    def __init__(self, *, endpoint: str, job: Job, explain: Callable[[], Decision]) -> None:
        """`explain` makes the decision out in words."""
        self.endpoint = endpoint
        self.job = job
        self._explain = explain
        self._decision: Decision | None = None

    @property
    def decision(self) -> Decision:
        """Why there; made when first asked for, since a worker waits for the job and nobody for this."""
        if self._decision is None:
            self._decision = self._explain()
        return self._decision


class Reclaim(msgspec.Struct, frozen=True, kw_only=True):
    """Take a job back from an endpoint whose lease ran out; the request waits again. Fences its late writes."""

    id: str
    entry: str
    endpoint: str
    attempt: int
    deadline_at: float | None
    decision: Decision


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """Write the terminal record of a request that no worker holds."""

    entry: str
    reply_to: str
    result: Result
    is_dead: bool = False
    "Also keep its fields in `dead`."
    request: Request | None = None
    "The fields to keep there."


class Abort(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the endpoint's worker to end this attempt: it was cancelled."""

    id: str
    endpoint: str
    attempt: int


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """Acknowledge an entry that repeats a living request, and write nothing."""

    id: str
    entry: str


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Log a decision that moves nothing."""

    decision: Decision

    deadline_at: float | None = None
    "Of a request that was read and waits: its place among the waiting."


Command = Assign | Reclaim | Finish | Abort | Forget | Note
