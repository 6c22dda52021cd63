"""What may go wrong, on request: the bodies of `POST /emulator/fault`.

Faults of requests wait in a line and hit the next requests in order; faults of the engine
strike at once.
"""

from collections import deque

import msgspec


class _RequestFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    count: int = 1
    "How many of the next requests it hits."

    after_tokens: int = 0
    "Tokens that reach the client before it strikes; for those that strike in a stream."


class HttpStatus(_RequestFault, frozen=True, tag="status"):
    """Answered with this status instead."""

    status: int = 500


class Garbage(_RequestFault, frozen=True, tag="garbage"):
    """200 with a body that is neither JSON nor events."""


class Silence(_RequestFault, frozen=True, tag="silence"):
    """Never answered: not even headers."""


class Hang(_RequestFault, frozen=True, tag="hang"):
    """The stream stops and stays open."""


class Cut(_RequestFault, frozen=True, tag="cut"):
    """The connection breaks."""


class ErrorChunk(_RequestFault, frozen=True, tag="error_chunk"):
    """An error inside a 200, then [DONE]."""


class Abort(_RequestFault, frozen=True, tag="abort"):
    """Ended with `finish_reason: abort`."""


class NoTokens(_RequestFault, frozen=True, tag="no_tokens"):
    """200 without a single token, as a draining server answers."""


class NoDone(_RequestFault, frozen=True, tag="no_done"):
    """The answer comes whole, but the stream ends without its finish reason and [DONE]."""


class Endless(_RequestFault, frozen=True, tag="endless"):
    """It says so many tokens, whatever limit it was given."""

    tokens: int = 10_000


class Slow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="slow"):
    """Every step takes `factor` times as long, until told otherwise."""

    factor: float


class Freeze(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="freeze"
):
    """The engine stands still; HTTP goes on and `/health` says 200."""


class Thaw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="thaw"):
    """Ends a freeze."""


class Crash(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="crash"):
    """The engine process dies under the server, which notices and follows it."""


class Die(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="die"):
    """The whole process is gone at once, as after kill -9."""


class Clear(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="clear"):
    """Forget the faults that have not struck yet."""


RequestFault = (
    HttpStatus | Garbage | Silence | Hang | Cut | ErrorChunk | Abort | NoTokens | NoDone | Endless
)
StreamFault = Hang | Cut | ErrorChunk | Abort
"Those that strike after a number of tokens."
EngineFault = Slow | Freeze | Thaw | Crash | Die | Clear
Fault = RequestFault | EngineFault


class FaultLine:
    """Faults that wait for their request, in the order they came."""

    def __init__(self) -> None:
        self._line: deque[RequestFault] = deque()

    def put(self, fault: RequestFault) -> None:
        self._line.extend([fault] * fault.count)

    def take(self) -> RequestFault | None:
        return self._line.popleft() if self._line else None

    def clear(self) -> None:
        self._line.clear()
