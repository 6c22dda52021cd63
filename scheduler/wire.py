"""Every message that crosses Redis, as a Struct; `codec` turns each into flat text fields.

The life of a request in messages:
    1. `Request`   client -> `requests`
    2. `Job`       dispatcher -> `jobs:<endpoint>`
    3. `Beat`      worker -> `beats`: alive, what it can do, what has started and given its first token
    4. `Tokens`    worker -> `tokens:<id>`, when the request streams
    5. `Result`    worker or dispatcher -> `results` or the request's `reply_to`: exactly one
    6. `Reward`    worker -> `rewards`: what this attempt cost
and beside it `Control` (people's wishes), `Decision` (why it went there) and `Dead` (what could not be served).

Names end in their unit: `ttft_s` here is `ttft_ms` on the wire, `finished_at` is unix milliseconds on the wire.
"""

import re
from typing import Literal

import msgspec

Outcome = Literal["completed", "expired", "rejected", "cancelled", "failed", "invalid"]
"How a request ends. Exactly one a request, the same words wherever a person meets them."

Leg = Literal["whole", "prefill", "decode"]
"What part of a request a job is."

EndpointState = Literal["ready", "draining", "away"]
"`ready` takes work, `draining` finishes what it has, `away`: the worker lives but its engine does not."

PATHS = ("/v1/chat/completions", "/v1/completions")
"Where a body may be posted on an engine."

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
"An id is part of key names and is typed by people: no spaces, no braces, at most 128 characters."

KV_PARAMS_BYTES = 131_072
"The longest `kv_transfer_params` that are carried: an engine that names more blocks prefills for nobody."

BLOCKS_MAX = 512
"The most prefix blocks a request may bring; the rest of a longer prompt cannot be matched."


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client enqueues. Only `model` and `body` are needed; the order of fields is free."""

    id: str = ""
    "The client's own id; the entry id where empty. A second request with a living or finished id is refused."

    model: str
    "The model asked for, as the engines name it."

    body: bytes = b""
    "The OpenAI body, JSON, opaque to the dispatcher. Empty: a claim check lies at `body:<id>`."

    path: str = PATHS[0]
    "Where the body is posted on the engine."

    objective: str = ""
    "A named objective from the settings; explicit fields below override its parts."

    ttft_s: float | None = None
    "Promise: time to first token, counted from the enqueue."

    tpot_s: float | None = None
    "Promise: mean time per output token after the first."

    deadline_s: float | None = None
    "Promise: the whole answer, counted from the enqueue. Past it the request expires."

    deadline_at: float | None = None
    "The same as a moment, unix milliseconds; the earlier of the two holds."

    max_queue_s: float | None = None
    "Still without an endpoint after this long it is rejected; never later than its objective says."

    priority: int | None = None
    "Higher first; negative may be shed."

    tenant: str = ""
    "Whose request it is, for fairness."

    session: str = ""
    "Requests of one session share prefixes."

    stream: bool = False
    "Write tokens to `tokens:<id>` as they come."

    reply_to: str = ""
    "The stream for the terminal record; must begin with the pool's `results:`. Empty: the pool's `results`."

    max_attempts: int | None = None
    "How often it may be tried on an engine."

    prompt_tokens: int | None = None
    "Length of the prompt; estimated from the body's bytes where absent."

    expected_tokens: int | None = None
    """
    How long the answer will be, as the application or its predictor thinks; what is usual of the model where absent.

    A guess that plans are made with: nothing is cut by it, and nobody is punished for a wrong one.
    """

    blocks: tuple[str, ...] = ()
    "Chained hashes of the prompt's blocks, first block first."

    traceparent: str = ""
    "W3C trace context, handed through to the engine."

    extra: dict[str, str] = {}
    "Fields we do not know: kept, never fatal."


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
    "For `decode`: the prefill engine's `kv_transfer_params`, JSON, as its reward brought them; opaque."

    kv_until_at: float | None = None
    "For `decode`: from then on the prefill engine may have forgotten the KV; a later job is handed back."


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint's heartbeat, and at once its progress: written each `beat_s`, and sooner when there is news."""

    endpoint: str
    "The endpoint's name."

    epoch: int
    "Grows whenever the worker starts; what an older epoch held is lost and given back."

    worker: str = ""
    "The process beside it."

    state: EndpointState = "ready"
    "Whether it takes work."

    reason: str = ""
    "Why it is draining or away."

    roles: tuple[str, ...] = ("both",)
    "`prefill`, `decode`, `encode`, `both`."

    models: tuple[str, ...] = ()
    "What it serves."

    hardware: str = ""
    "Its class for the cost prior, such as `a100`; empty: unknown, learned from scratch."

    max_num_seqs: int = 256
    "The engine's seats."

    kv_tokens: int = 0
    "The engine's KV capacity in tokens; 0: unknown."

    block_tokens: int = 0
    "The engine's block size; 0: unknown."

    max_model_len: int = 0
    "The longest context it serves; 0: unknown."

    link_gbps: float = 0.0
    "Gigabits a second of its link, when KV is handed over; 0: it hands over none, and takes only whole requests."

    kv_token_bytes: int = 0
    "One token's KV: what a hand-over must carry; 0: unknown."

    running: int = 0
    "Requests in the engine's batch, as scraped; information, never the control signal."

    queued: int = 0
    "Requests waiting inside the engine, as scraped."

    held: int = 0
    "Jobs the worker holds and has not yet admitted."

    kv_usage: float = 0.0
    "0 to 1, as scraped."

    step_s: float = 0.0
    "Decode step time as the worker measures it now; 0: nothing decoding."

    scraped_at: float | None = None
    "When running, queued and kv_usage were read."

    engine: str = ""
    "The engine's version, as it says; empty: unknown."

    features: tuple[str, ...] = ()
    "What the engine can do besides: `request_metrics`, `cached_tokens`, `priority`, `admission`, `pause`, `kv_events`."

    started: tuple[str, ...] = ()
    "`id:attempt` admitted to the engine since the last beat."

    first_tokens: tuple[str, ...] = ()
    "`id:attempt:milliseconds` since the last beat: engine time from admission to first token."

    read_at: float | None = None
    "Every job handed over before is read; what of them is neither held nor ended is lost. Empty: not said this time."

    holds: tuple[str, ...] = ()
    "With `read_at`: `id:attempt` of the jobs read and not ended, by id, those behind `holds_after` up to `holds_to`."

    holds_after: str = ""
    "Which id these come behind; empty: from the first."

    holds_to: str = ""
    "Up to which id they go, with it; empty: to the last. More follow in the next beats."

    kv_epoch: int = 0
    "Which telling of the engine's prefix cache this is; each begins with a listing. 0: the engine does not tell."

    kv_seq: int = 0
    "1 for the first change of an epoch, one more for each; a gap means that one was missed."

    kv_stored: tuple[str, ...] = ()
    "Prefix blocks, as in a request's `blocks`, that its cache holds now."

    kv_removed: tuple[str, ...] = ()
    "Those that it does not hold any more."

    kv_rest: int = 0
    "How many of the listing still follow; once it is 0, what was not listed is not there."

    kv_was_empty: bool = False
    "Whether the cache was empty when this epoch began."


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a request's token log. Joining `text` in order gives the whole answer, each token once."""

    attempt: int
    "Which attempt wrote it."

    index: int
    "How many pieces of text came before this entry, over all attempts."

    text: str = ""
    "Text since the entry before."

    chunks: str = ""
    "JSON list of the engine's own chunks where they carry more than text (tool calls, log probabilities)."

    output_tokens: int = 0
    "Tokens up to and with this entry, over all attempts, as the engine counts: what a later attempt goes on from."

    end: str = ""
    "The outcome, on the last entry only."


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The one terminal record of a request."""

    id: str
    "The request's id."

    outcome: Outcome
    "How it ended."

    reason: str = ""
    "Why, for every outcome but `completed`."

    status: int = 0
    "The engine's HTTP status, where there was one."

    retry_after_s: float | None = None
    "When to come back, for `rejected`."

    endpoint: str = ""
    "Who served it."

    attempt: int = 0
    "Which attempt ended it; 0: never assigned."

    finish_reason: str = ""
    "`stop` or `length`, as the engine says."

    prompt_tokens: int = 0
    "As the engine counts."

    cached_tokens: int = 0
    "Of these, found in the prefix cache."

    output_tokens: int = 0
    "As the engine counts, over all attempts."

    enqueued_at: float | None = None
    "When the promise's clock started."

    first_token_at: float | None = None
    "When the first token arrived at the worker."

    finished_at: float | None = None
    "When it ended."

    ttft_s: float | None = None
    "From the enqueue to the first token."

    tpot_s: float | None = None
    "Mean seconds a token after the first; absent below two tokens."

    on_time: bool | None = None
    "Whether every promise was kept; absent where none was made."

    body: bytes = b""
    "The OpenAI response, JSON."


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt cost on one endpoint, with the features its decision saw. Worker to dispatcher."""

    id: str
    "The request's id."

    endpoint: str
    "Who served it."

    epoch: int
    "The endpoint's epoch."

    attempt: int
    "Which attempt."

    leg: Leg = "whole"
    "What part of the request."

    outcome: str
    """
    The terminal outcome; or `returned`: handed back, to be tried again; or `prefilled`: a `prefill` leg has done
    its part, and the request waits for an endpoint that decodes.
    """

    reason: str = ""
    "Why, unless completed."

    retryable: bool = True
    "Whether another attempt may do better; matters for `returned`."

    model: str = ""
    "As asked for."

    hardware: str = ""
    "The endpoint's class."

    decided_at: float | None = None
    "When it was assigned."

    pulled_at: float | None = None
    "When the worker read the job."

    admitted_at: float | None = None
    "When it was sent to the engine."

    first_token_at: float | None = None
    "When the first token arrived."

    finished_at: float | None = None
    "When it ended."

    enqueued_at: float | None = None
    "When the promise's clock started."

    prefill_s: float | None = None
    "Measured: from `admitted_at` to `first_token_at`."

    predicted_s: float | None = None
    "Predicted: from `decided_at` to the first token, as the job said."

    queue_s: float | None = None
    "The engine's own queue time, where it reports it."

    ttft_s: float | None = None
    "From the enqueue to the first token."

    tpot_s: float | None = None
    "Mean seconds a token after the first."

    gap_max_s: float | None = None
    "The longest gap between tokens."

    prompt_tokens: int = 0
    "As the engine counts."

    cached_tokens: int | None = None
    "As the engine says; absent where it does not."

    output_tokens: int = 0
    "As the engine counts."

    on_time: bool | None = None
    "Whether every promise was kept."

    tenant: str = ""
    "Whose request it was."

    features: tuple[str, ...] = ()
    "The job's features, verbatim."

    kv_params: bytes = b""
    "For `prefilled`: the engine's `kv_transfer_params`, JSON, opaque, at most 128 KiB."


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """A person's wish, on `controls`."""

    action: Literal["cancel", "drain", "resume"]
    "`cancel` a request; `drain` an endpoint, or `resume` it."

    id: str = ""
    "The request to cancel."

    endpoint: str = ""
    "The endpoint to drain or resume."

    reason: str = ""
    "For the record."


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
    "Where an endpoint was drawn: `endpoint=chance,start_s,cached_tokens,kv_used` of each candidate."

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
