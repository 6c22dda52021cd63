"""A worker's moves, each fenced by (endpoint, epoch, attempt). Each builds one `Call`; a reply of 0 means fenced."""

from collections.abc import Sequence

import msgspec

from dispatcher.streams.connection import Call
from dispatcher.streams.producer import NOTHING, milliseconds, packed, packed_fields, score
from scheduler import codec
from scheduler.keys import DISPATCHER_GROUP, WORKER_GROUP, Keys
from scheduler.wire.dispatcher import Dead, Job
from scheduler.wire.worker import Beat, Result, Reward, Tokens

BEATS_KEPT = 20_000
"About how many heartbeats the log keeps: minutes of a large fleet."

REWARDS_KEPT = 200_000
"About how many rewards the log keeps, for learning again and for off-line evaluation."


NEWS = frozenset(
    {
        *("started", "first_tokens", "read_at", "holds", "holds_after", "holds_to"),
        *("kv_epoch", "kv_seq", "kv_stored", "kv_removed", "kv_rest", "kv_was_empty"),
    }
)
"What a beat tells of a moment, and a glance at the endpoint need not."


class Held(msgspec.Struct, frozen=True):
    """A job in a worker's hands: what the fence compares."""

    endpoint: str
    job: Job
    job_entry: str
    "Its entry in the endpoint's stream."


def join(keys: Keys, endpoint: str, worker: str) -> Call:
    """Become the endpoint's worker. The reply is the new epoch; any older worker is fenced from now on."""
    return Call("join", (keys.endpoint(endpoint),), (worker,))


def beat(keys: Keys, message: Beat, *, lease_s: float) -> Call:
    """Say that the endpoint lives. The reply is 1; 0: a newer worker has joined in its name."""
    fields = codec.encode(message)
    glance = {name: value for name, value in fields.items() if name not in NEWS}
    glance["seen_lease_ms"] = str(milliseconds(lease_s))
    # The glance outlives the lease, so that people can still see who died.
    return Call(
        "beat",
        (keys.endpoint(message.endpoint), keys.beats, keys.jobs(message.endpoint)),
        (
            message.epoch,
            BEATS_KEPT,
            milliseconds(600 * lease_s),
            packed_fields(glance),
            packed_fields(fields),
        ),
    )


def dismiss(keys: Keys, endpoint: str, epoch: int, entries: Sequence[str]) -> Call:
    """Be done with entries of the endpoint's stream that nobody needs any more. The reply is how many; 0: not ours to say."""
    names = (keys.endpoint(endpoint), keys.jobs(endpoint))
    return Call("dismiss", names, (epoch, WORKER_GROUP, *entries))


def start(keys: Keys, held: Held) -> Call:
    """Ask, at the moment of admission, whether the job is still ours. The reply is 1; 2: cancelled; 0: not ours."""
    return Call("start", (keys.request(held.job.id),), (held.endpoint, held.job.attempt))


def tokens(keys: Keys, held: Held, message: Tokens, *, ttl_s: float) -> Call:
    """Append to the token log, each index once. The reply is 1; 0: not ours."""
    return Call(
        "tokens",
        (keys.request(held.job.id), keys.tokens(held.job.id)),
        (
            held.endpoint,
            held.job.attempt,
            message.index,
            message.pieces,
            milliseconds(ttl_s),
            packed(message),
        ),
    )


def rewind(keys: Keys, held: Held) -> Call:
    """Empty a token log that cannot be gone on from, before anything is said. The reply is 1; 0: not ours."""
    job = held.job
    return Call("rewind", (keys.request(job.id), keys.tokens(job.id)), (held.endpoint, job.attempt))


def finish(
    keys: Keys, held: Held, result: Result, *, pieces: int, ttl_s: float, is_dead: bool = False
) -> Call:
    """The terminal record and the end of the token log, all that a client waits for. The reply is 1; 0: not ours.

    `settle` must follow it. `pieces` is how many pieces of text the token log holds.
    """
    job = held.job
    reply = job.reply_to or keys.results
    last = (
        packed(Tokens(attempt=job.attempt, index=pieces, end=result.outcome))
        if job.stream
        else NOTHING
    )
    return Call(
        "finish",
        (keys.request(job.id), reply, keys.tokens(job.id), keys.dead, keys.requests),
        (
            held.endpoint,
            job.attempt,
            job.entry,
            result.outcome,
            milliseconds(ttl_s),
            int(reply != keys.results),
            packed(result),
            last,
            packed_fields(_dead_fields(keys, held, result)) if is_dead else NOTHING,
        ),
    )


def behind(call: Call) -> Call:
    """The same move where one before it, of the same attempt, goes with it: refused if that one was."""
    if call.function not in ("tokens", "finish"):
        return call
    return Call(call.function, call.keys, (*call.args, 1))


def settle(keys: Keys, held: Held, reward: Reward, *, is_dead: bool = False) -> Call:
    """Both acknowledgements and the reward of what `finish` has ended; where that was refused, only the stale job's.

    The reply is 1; 0: it was said before, or somebody else has taken the job up.
    """
    job = held.job
    return Call(
        "settle",
        (
            keys.request(job.id),
            keys.jobs(held.endpoint),
            keys.requests,
            keys.body(job.id),
            keys.rewards,
        ),
        (
            held.endpoint,
            job.attempt,
            WORKER_GROUP,
            held.job_entry,
            DISPATCHER_GROUP,
            job.entry,
            int(is_dead),
            REWARDS_KEPT,
            packed(reward),
        ),
    )


def hand_back(
    keys: Keys, held: Held, reward: Reward, *, kv_params: bytes = b"", kv_ttl_s: float = 0.0
) -> Call:
    """Give the job back to be tried elsewhere, and say what it cost. The reply is 1; 0: not ours.

    Of a prefill leg that has done its part, `kv_params` are the engine's word on where its KV is, kept for so long: a
    claim check, as of a long body. They name every block, and the log of rewards is long.
    """
    job = held.job
    names = (
        keys.request(job.id),
        keys.jobs(held.endpoint),
        keys.waiting,
        keys.rewards,
        keys.kv(job.id),
    )
    return Call(
        "hand_back",
        names,
        (
            held.endpoint,
            job.attempt,
            held.job_entry,
            WORKER_GROUP,
            job.id,
            score(job.deadline_at),
            REWARDS_KEPT,
            packed(reward),
            kv_params,
            milliseconds(kv_ttl_s),
        ),
    )


def _dead_fields(keys: Keys, held: Held, result: Result) -> dict[str, str | bytes]:
    """What is told of its death, and its fields as the job knows them, should its own entry be gone."""
    job = held.job
    dead = Dead(
        dead_stream=keys.requests,
        dead_entry=job.entry,
        dead_reason=result.reason,
        dead_outcome=result.outcome,
    )
    return codec.encode(dead) | {
        "id": job.id,
        "model": job.model,
        "body": job.body,
        "path": job.path,
        "priority": str(job.priority),
        "tenant": job.tenant,
        "session": job.session,
        "stream": "1" if job.stream else "0",
        "reply_to": job.reply_to,
        "max_attempts": str(job.max_attempts),
        "prompt_tokens": str(job.prompt_tokens),
    }
