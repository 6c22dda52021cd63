"""How the door says no: one table from what happened to a status, a word and when to come back."""

import math

import msgspec

from scheduler.errors import RequestRejected
from scheduler.wire.worker import Result

RETRY_S = 1.0
"When to come back where nobody knows better: about a lease's third."

CANCELLED = 499
"nginx's status for a client that went away; no standard has one."

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    CANCELLED: "RequestCancelledError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
"The `type` of each status, as vLLM and OpenAI's clients name them."

STATUSES = {
    "expired": 504,
    "rejected": 429,
    "cancelled": CANCELLED,
    "failed": 502,
    "invalid": 400,
}
"The status of each way to end, but for what `of_record` knows better."


class Refusal(Exception):
    """A request that gets an error in place of an answer; `reason` is one word a program can read."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.param = param
        self.retry_after_s = retry_after_s
        self.beside: dict[str, str] = {}
        "Headers of whoever knows more of the request."

    @property
    def headers(self) -> dict[str, str]:
        """What stands beside the body."""
        headers = {"x-headgate-reason": self.reason} | self.beside
        if self.retry_after_s is not None:
            # Whole seconds: the header knows no others.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers

    def body(self) -> bytes:
        """In OpenAI's shape with vLLM's fields; the same as a chunk inside a stream."""
        kind = KINDS.get(self.status) or ("BadRequestError" if self.status < 500 else KINDS[500])
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


def of_record(record: Result, *, is_served: bool) -> Refusal:
    """A terminal record that is no answer.

    Args:
        record: ended other than `completed`.
        is_served: whether an endpoint that lives serves its model; if none does, the queue was not the cause.
    """
    status, reason = STATUSES[record.outcome], str(record.outcome)
    message = record.reason or f"the request {record.outcome}"
    if record.outcome == "failed" and 400 <= record.status < 500:
        status, reason = record.status, "engine_refused"
    elif record.outcome == "rejected" and not is_served:
        return no_endpoint(message)
    elif record.outcome == "invalid" and record.reason.startswith("field 'model'"):
        status, reason = 404, "unknown_model"
    retry_after_s = record.retry_after_s
    if status == 429 and retry_after_s is None:
        retry_after_s = RETRY_S
    return Refusal(status, reason, message, retry_after_s=retry_after_s)


def queue_full(error: RequestRejected) -> Refusal:
    """No room in the pool's queue."""
    return Refusal(429, "queue_full", error.reason, retry_after_s=error.retry_after_s or RETRY_S)


def no_endpoint(message: str) -> Refusal:
    """Nobody there who could serve it."""
    return Refusal(503, "no_endpoint", message, retry_after_s=RETRY_S)


def unknown_model(model: str, served: list[str]) -> Refusal:
    """Nobody serves it or ever did; in vLLM's words."""
    known = ", ".join(served) or "none"
    message = f"The model `{model}` does not exist, wanted one of: {known}"
    return Refusal(404, "unknown_model", message, param="model")


def redis_away(error: Exception) -> Refusal:
    """The request could not be accepted, or its fate is not known: the same id may be sent again."""
    return Refusal(503, "redis_away", str(error), retry_after_s=RETRY_S)
