"""The leading dispatcher's moves, each fenced by its epoch. Each builds one `Call`; a reply of -1 means deposed."""

from collections.abc import Mapping, Sequence

from dispatcher.streams.connection import Call, Value
from dispatcher.streams.producer import NOTHING, milliseconds, packed, packed_fields, score
from scheduler import codec
from scheduler.events import Abort, Arrived, Assign, Finish, Reclaim, Recovered
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.client import Control
from scheduler.wire.dispatcher import Dead, Decision
from scheduler.wire.worker import Tokens

FENCED = -1
"What every move here replies when a newer leader exists."

DECISIONS_KEPT = 100_000
"About how many decisions the log keeps; at 300 B each some 30 MB."

DEAD_KEPT = 10_000
"About how many dead entries are kept; whoever has more has not looked for long."


def lead(keys: Keys, node: str, *, ttl_s: float, epoch: int = 0) -> Call:
    """Take or, with one's own epoch, renew the lease. The reply is [epoch or 0, holder, until in ms]."""
    return Call("lead", (keys.leader,), (node, milliseconds(ttl_s), epoch))


def resign(keys: Keys, epoch: int, node: str = "") -> Call:
    """End the lease at once, so that a standby need not wait for it to run out.

    With an epoch of 0 whichever lease the node has: its grant may have come while the node was being stopped.
    """
    return Call("resign", (keys.leader,), (epoch, node))


def save(keys: Keys, epoch: int, snapshot: bytes) -> Call:
    """Keep the warm-start state."""
    return Call("save", (keys.leader, keys.snapshot), (epoch, snapshot))


def accept(keys: Keys, epoch: int, arrived: Arrived | Recovered, deadline_at: float | None) -> Call:
    """Write down that the request is read. The reply is 1; 2: it is cancelled already; 0: a duplicate entry."""
    request_id = arrived.request.id
    names = (keys.leader, keys.request(request_id), keys.requests, keys.waiting)
    return Call(
        "accept", names, (epoch, DISPATCHER_GROUP, request_id, arrived.entry, score(deadline_at))
    )


def assign(keys: Keys, epoch: int, command: Assign, *, is_new: bool = False) -> Call:
    """Hand a job over. The reply is its entry in the endpoint's stream; 0: refused.

    `is_new`: it was read in this very step, and nobody has said `accept` of it. Why is logged by `notes`.
    """
    job = command.job
    names = (
        keys.leader,
        keys.request(job.id),
        keys.jobs(command.endpoint),
        keys.waiting,
    )
    return Call(
        "assign",
        names,
        (
            epoch,
            job.id,
            job.entry,
            command.endpoint,
            job.attempt,
            job.epoch,
            int(is_new),
            job.leg,
            packed(job),
        ),
    )


def reclaim(keys: Keys, epoch: int, command: Reclaim) -> Call:
    """Take a job back. The reply is 1; 0: it is no longer there, its reward is on the way."""
    names = (
        keys.leader,
        keys.request(command.id),
        keys.jobs(command.endpoint),
        keys.waiting,
        keys.decisions,
    )
    return Call(
        "reclaim",
        names,
        (
            epoch,
            command.id,
            command.endpoint,
            command.attempt,
            WORKER_GROUP,
            score(command.deadline_at),
            DECISIONS_KEPT,
            packed(command.decision),
        ),
    )


def conclude(
    keys: Keys,
    epoch: int,
    command: Finish,
    *,
    ttl_s: float,
    fields: Mapping[str, Value] | None = None,
) -> Call:
    """Write the terminal record of a request that no worker holds. The reply is 1; 0: it was not ours to end.

    `fields` are the entry's own, as they were, where it could not be read: they go to `dead`.
    """
    result = command.result
    reply = command.reply_to or keys.results
    names = (
        keys.leader,
        keys.request(result.id),
        keys.requests,
        keys.waiting,
        reply,
        keys.body(result.id),
        keys.tokens(result.id),
        keys.dead,
    )
    is_streamed = command.request is not None and command.request.stream
    last = (
        packed(Tokens(attempt=result.attempt, index=0, end=result.outcome))
        if is_streamed
        else NOTHING
    )
    dead = _dead_fields(keys, command, fields)
    return Call(
        "conclude",
        names,
        (
            epoch,
            DISPATCHER_GROUP,
            result.id,
            command.entry,
            result.outcome,
            milliseconds(ttl_s),
            int(reply != keys.results),
            packed(result),
            last,
            packed_fields(dead) if dead else NOTHING,
        ),
    )


def _dead_fields(
    keys: Keys, command: Finish, fields: Mapping[str, Value] | None
) -> dict[str, Value]:
    if not command.is_dead:
        return {}
    result = command.result
    dead = Dead(
        dead_stream=keys.requests,
        dead_entry=command.entry,
        dead_reason=result.reason,
        dead_outcome=result.outcome,
    )
    own = codec.encode(command.request) if command.request is not None else {}
    return {**codec.encode(dead), **(fields or own)}


def notes(keys: Keys, epoch: int, decisions: Sequence[Decision]) -> Call:
    """Log decisions, in one call. The reply is how many."""
    parts = [packed(decision) for decision in decisions]
    return Call("log", (keys.leader, keys.decisions), (epoch, DECISIONS_KEPT, *parts))


def abort(keys: Keys, epoch: int, command: Abort) -> Call:
    """Tell the endpoint's worker, on its own stream, to end an attempt. The reply is 1."""
    control = Control(action="cancel", id=command.id, endpoint=command.endpoint)
    return Call("log", (keys.leader, keys.jobs(command.endpoint)), (epoch, 0, packed(control)))


def retire(keys: Keys, consumer: str, *, idle_s: float) -> Call:
    """Forget a consumer of `requests` that holds nothing and was silent for long. The reply is 1; 0: kept."""
    return Call("retire", (keys.requests,), (DISPATCHER_GROUP, consumer, milliseconds(idle_s)))


def bury(keys: Keys, epoch: int, fields: Mapping[str, Value]) -> Call:
    """Set aside an entry that nobody waits for: a beat, reward or control that cannot be read."""
    return Call("log", (keys.leader, keys.dead), (epoch, DEAD_KEPT, packed_fields(fields)))
