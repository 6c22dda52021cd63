"""What workers write: how their endpoint fares, tokens, how a request ended, and what that cost.

The dispatcher writes a `Result` too, where no worker holds the request.
"""

import msgspec

from scheduler.wire.words import EndpointState, Leg, Outcome


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

    no_prefix_cache: bool = False
    "Whether the engine forgets a prompt's KV with the request: who begins alike finds and shares nothing there."

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
    "0 to 1, as scraped: no more of its KV is given away than this leaves, whatever was expected."

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
    "`id:attempt:milliseconds` since the last beat: from the pull of its job to its first token."

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

    pieces: int = 0
    "How many are in it: the next entry's `index` is that much higher, or something between is missing."

    text: str = ""
    "Text since the entry before."

    chunks: str = ""
    "JSON list of the engine's own chunks where they carry more than text (tool calls, log probabilities)."

    output_tokens: int = 0
    "Tokens up to and with this entry, over all attempts, as the engine counts: what a later attempt goes on from."

    end: str = ""
    "The outcome, on the last entry only."

    lost: int = 0
    "Pieces right before this entry that Redis had taken and has lost; its function finds it, nobody else writes it."


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
    "`stop`, `length`, `tool_calls` or `repetition`, as the engine says."

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
    """
    For `prefilled`: where its KV is, a JSON object, opaque, at most 128 KiB. Workers put a claim here: the engine's
    `kv_transfer_params` name every block, and lie at `kv:<id>` for as long as they are of use.
    """
