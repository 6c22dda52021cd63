"""Every error Headgate raises, and who is at fault.

    HeadgateError
    ├── SettingsError            ours: the operator's settings; stop and say so
    ├── WireError                theirs: an entry that cannot be read; set it aside and go on
    ├── StreamError              the weather: Redis away, too old, not ours; wait or stop
    │   └── FencedError          somebody newer holds the lease; whoever sees this stands down
    ├── TraceError               theirs: a trace file with a wrong line (scheduler.sim.trace)
    ├── UnknownRequestError      no request of that id, or its record's time is over; raised by the client
    ├── EngineError              an engine's answer that is no success; the worker retries or reports
    └── OutcomeError             a request that ended other than `completed`; raised by the client
        ├── RequestExpired
        ├── RequestRejected
        ├── RequestCancelled
        ├── RequestFailed
        └── RequestInvalid

A bug is an `AssertionError`: crash, restart, recover from the streams.
"""

from typing import ClassVar

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"What decoding raises of bytes that are no message: broken, no UTF-8, or nested without a bottom."


class HeadgateError(Exception):
    """The root: catch this to catch all of ours and nothing else."""


class SettingsError(HeadgateError):
    """A setting is unknown or unusable; the message names its path, what was found and what is wanted."""


class WireError(HeadgateError):
    """An entry breaks the wire's rules; the message names the field, what was found and what is wanted."""


class StreamError(HeadgateError):
    """Redis cannot be used as it is: unreachable, refused, older than 7.0, or misconfigured."""


class FencedError(StreamError):
    """A move was refused because a newer lease exists; nothing was written."""


class UnknownRequestError(HeadgateError):
    """There is no request of that id, or it ended so long ago that its record is gone."""


class EngineError(HeadgateError):
    """What an engine did instead of answering well.

    `retryable` is False only where the same request must fail anywhere (a 4xx that names the request).
    """

    def __init__(self, reason: str, *, retryable: bool = True, status: int = 0) -> None:
        super().__init__(reason)
        self.retryable = retryable
        self.status = status


class OutcomeError(HeadgateError):
    """The request ended, but not as `completed`; `reason` is the terminal record's own."""

    outcome: ClassVar[str] = ""

    def __init__(self, request_id: str, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"request {request_id!r} {self.outcome}: {reason}")
        self.request_id = request_id
        self.reason = reason
        self.retry_after_s = retry_after_s


class RequestExpired(OutcomeError):
    """Its deadline passed before it could finish."""

    outcome = "expired"


class RequestRejected(OutcomeError):
    """Admission refused it; `retry_after_s` says when to come back."""

    outcome = "rejected"


class RequestCancelled(OutcomeError):
    """Somebody cancelled it."""

    outcome = "cancelled"


class RequestFailed(OutcomeError):
    """The engines could not answer it within its attempts."""

    outcome = "failed"


class RequestInvalid(OutcomeError):
    """It could not be read or can never be served as it stands."""

    outcome = "invalid"
