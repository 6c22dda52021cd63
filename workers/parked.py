"""A prefill leg's answer: one token for nobody, what it cost, and where the prompt's KV is now."""

import msgspec

from scheduler.errors import UNREADABLE, EngineError
from workers import halves
from workers.answer import Answer, refusal
from workers.chunk import Fault, Times, Usage

ANSWER_BYTES = 16 * 2**20
"The longest that is read: a token, perhaps with its log probabilities, and the blocks of a long prompt."


class _Whole(msgspec.Struct):
    usage: Usage | None = None
    metrics: Times | None = None
    error: Fault | str | None = None
    kv_transfer_params: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Whole).decode


class Parked:
    """`feed` it the bytes as they come, then ask what is `told`."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Take in what the engine sent.

        Raises:
            EngineError: it is too much.
        """
        self._parts.append(data)
        self._size += len(data)
        if self._size > ANSWER_BYTES:
            raise EngineError(f"the answer to a prefill leg is over {ANSWER_BYTES} bytes")

    def told(self, answer: Answer) -> bytes:
        """Where the KV is; `answer` is told what it cost.

        Raises:
            EngineError: the engine failed, or does not say where.
        """
        try:
            found = _decode(b"".join(self._parts))
        except UNREADABLE as error:
            raise EngineError(f"the answer to a prefill leg cannot be read: {error}") from None
        if found.error is not None:
            fault = Fault(found.error) if isinstance(found.error, str) else found.error
            raise refusal(fault.status, fault.message)
        answer.usage, answer.metrics = found.usage, found.metrics
        kv_params = bytes(found.kv_transfer_params)
        if kv_params in (b"", b"null"):
            raise EngineError(
                f"the answer has no {halves.PARAMS}: was the engine started with --kv-transfer-config?"
            )
        return halves.checked(kv_params)
