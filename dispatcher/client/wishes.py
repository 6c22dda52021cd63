"""What a client may wish for a request beside its body; every wish is optional."""

from typing import TypedDict


class Wishes(TypedDict, total=False):
    """The keyword arguments of `Client.submit` and `Client.request`."""

    model: str
    "The model; default the body's own."

    id: str
    "The key of its idempotence, at most 128 characters; default made of the client's name."

    path: str
    "Where the engine takes it; default completions for a body with a `prompt`, else chat."

    objective: str
    "A promise by its name in the settings; the explicit ones below override its parts."

    ttft_s: float | None
    "Promised time to first token, from the enqueue."

    tpot_s: float | None
    "Promised mean time per output token after the first."

    deadline_s: float | None
    "Promised time for the whole answer, from the enqueue; past it the request expires."

    deadline_at: float | None
    "The same as a moment, unix seconds; the earlier of the two holds."

    max_queue_s: float | None
    "Still without an endpoint after this long it is rejected; an objective's own limit holds as well."

    priority: int | None
    "Higher first; negative may be shed."

    tenant: str
    "Whose it is, for fairness."

    session: str
    "Requests of one session share prefixes."

    stream: bool
    "Write tokens as they come; default the body's own `stream`."

    expected_tokens: int | None
    "How long the answer will be, where something here can guess; nothing is cut by it."

    max_attempts: int | None
    "How often it may be tried on an engine."

    traceparent: str
    "W3C trace context, handed through to the engine."
