"""What the dispatcher writes: jobs for workers, and for people why, and what could not be served."""

from typing import Literal

import msgspec

from scheduler.wire.words import Leg


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request assigned to an endpoint. The lease is (endpoint, epoch, attempt)."""

    id: str
    "The request's id."

    entry: str
    "Its entry in `requests`, acknowledged by the terminal move."

    attempt: int
    "1 for the first; a late write of an older attempt is refused."

    epoch: int
    "The endpoint's epoch at the decision; a worker of another epoch ignores the job."

    leg: Leg = "whole"
    "What part of the request this is."

    model: str
    "As asked for."

    path: str
    "Where the body is posted."

    body: bytes = b""
    "The body, or empty for a claim check at `body:<id>`."

    stream: bool = False
    "Write a token log."

    enqueued_at: float
    "When the promise's clock started: the entry id's milliseconds."

    ttft_s: float | None = None
    "Promise, from `enqueued_at`."

    tpot_s: float | None = None
    "Promise, per output token after the first."

    deadline_at: float | None = None
    "The moment after which it expires."

    priority: int = 0
    "Higher first."

    weight: float = 1.0
    "What keeping its promise is worth beside others'."

    tenant: str = ""
    "Whose it is."

    session: str = ""
    "Which session."

    reply_to: str = ""
    "The stream for the terminal record."

    max_attempts: int = 3
    "How often it may be tried."

    prompt_tokens: int = 0
    "Length of the prompt as the dispatcher knows it."

    cached_tokens: int = 0
    "How much of it the dispatcher believes to be in the endpoint's prefix cache."

    blocks: tuple[str, ...] = ()
    "The request's prefix blocks, for an engine that tells of its cache; for others they need not travel."

    expected_tokens: int | None = None
    "How long the answer will be, as the request said; absent: nobody knows."

    decided_at: float
    "When it was assigned."

    prefill_s: float = 0.0
    "Predicted: the engine's time to first token, queue and prefill, from `decided_at`."

    features: tuple[str, ...] = ()
    "What the predictor saw, `name=value`; returned verbatim in the reward."

    traceparent: str = ""
    "W3C trace context."

    kv_params: bytes = b""
    "For `decode`: where its KV is, as the prefill leg's reward said it; opaque."

    kv_until_at: float | None = None
    "For `decode`: from then on the prefill engine may have forgotten the KV; a later job is handed back."

    kv_cached_tokens: int | None = None
    "For `decode`: how much of the prompt the prefill engine had cached, which is what the client is told; absent: unsaid."


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One turn in a request's life as the dispatcher decided it; `explain` prints them."""

    id: str
    "The request's id."

    kind: Literal[
        "read", "set_aside", "taken_up", "assigned", "prefilled", "kv_lost", "reclaimed", "finished"
    ]
    "What was decided."

    at: float | None = None
    "When, in the core's time; the entry's own id is when it was written down."

    policy: str = ""
    "Which policy decided."

    attempt: int = 0
    "Which attempt, for `assigned` and `reclaimed`."

    endpoint: str = ""
    "Where to, for `assigned`; from where, for `reclaimed`."

    slack_s: float | None = None
    "Deadline less now less the predicted rest, on the best endpoint."

    start_s: float | None = None
    "Predicted wait before the endpoint begins it."

    prefill_s: float | None = None
    "Predicted prefill on that endpoint."

    cached_tokens: int = 0
    "Prefix tokens believed cached there."

    best_cached_tokens: int = 0
    "Prefix tokens believed cached on the endpoint that has the most and may take it."

    waiting: int = 0
    "How many waited at that moment."

    propensity: float = 1.0
    "The probability with which the policy takes this endpoint here."

    candidates: tuple[str, ...] = ()
    "`endpoint=seconds` to first token, best first."

    weighed: tuple[str, ...] = ()
    "Where an endpoint was drawn of those that start now: `endpoint=chance,start_s,cached_tokens,pressure,others_s` of each."

    features: tuple[str, ...] = ()
    "What the predictor saw for the chosen endpoint."

    reason: str = ""
    "In words a person understands."


class Dead(msgspec.Struct, frozen=True, kw_only=True):
    """An entry that could not be read, or a request that failed for good; its own fields follow."""

    dead_stream: str
    "The stream it came from."

    dead_entry: str
    "Its entry id there."

    dead_reason: str
    "Why it lies here."

    dead_outcome: str = "invalid"
    "The terminal outcome its client got."

    extra: dict[str, str] = {}
    "The entry's own fields, as they were."
