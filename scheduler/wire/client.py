"""What clients and people write: a request, and a control of what is under way."""

from typing import Literal

import msgspec

from scheduler.wire.words import PATHS


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

    prompt_estimated: bool = False
    "That length is a guess: where it is above every context served, the request is tried and its engine judges."

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


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """What a person asks for, on `controls`."""

    action: Literal["cancel", "drain", "resume"]
    "`cancel` a request; `drain` an endpoint, or `resume` it."

    id: str = ""
    "The request to cancel."

    endpoint: str = ""
    "The endpoint to drain or resume."

    reason: str = ""
    "For the record."
