"""One request's answer on its way to the client.

A stream is written straight to the transport from pre-encoded pieces: a token costs one
join of bytes and one write. Going through the web framework's writer would cost a task
switch and three calls more for each.
"""

import asyncio
from typing import TYPE_CHECKING, Literal

import msgspec

from workers.emulator import text
from workers.emulator.faults import Abort, Cut, ErrorChunk, Hang, NoDone, StreamFault
from workers.emulator.protocol import Ask, error_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from scheduler.sim.sequence import Sequence

Ending = Literal["stop", "length", "abort", "error", "cut", "empty"]
"How an answer ended: vLLM's reasons, an engine's death, a broken connection, or no token at all."


class Answer:
    """The words of one request and how many of them have been said.

    1. `feed` says that the engine made more tokens; nothing is written yet.
    2. `flush` writes what was made since the last time, as one chunk.
    3. `end` writes the finish reason; `done` then carries how it ended.
    """

    __slots__ = (
        "_chunk_head",
        "_chunk_tail",
        "_fault",
        "_made",
        "_open",
        "_said",
        "_shape",
        "ask",
        "done",
        "ends_itself",
        "external_id",
        "kv_params",
        "metrics",
        "received_at",
        "sequence",
        "words",
        "write",
    )

    def __init__(
        self,
        ask: Ask,
        *,
        external_id: str,
        model: str,
        created: int,
        words: list[bytes],
        ends_itself: bool,
        received_at: float,
        has_details: bool,
    ) -> None:
        self.ask = ask
        self.external_id = external_id
        "What `abort_requests` knows it by."
        self.words = words
        self.ends_itself = ends_itself
        "Whether the words are the whole text, rather than all that `max_tokens` allows."
        self.received_at = received_at
        "Engine seconds at which its HTTP request came in."
        self.sequence: Sequence | None = None
        self.done: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.kv_params = b""
        "`kv_transfer_params` of an answer whose KV is kept; only an answer that is sent whole says them."
        self.metrics: dict[str, float] | None = None
        "Times of the request for its last chunk, where the server gives them."
        self.write: Callable[[bytes], None] | None = None
        "Where the stream goes; None for an answer that is sent whole."
        self._made = 0
        self._said = 0
        self._fault: StreamFault | NoDone | None = None
        self._open = True
        self._shape = _Shape(
            ask,
            response_id=_response_id(ask, external_id),
            model=model,
            created=created,
            has_details=has_details,
        )
        self._chunk_head, self._chunk_tail = self._shape.token_pieces()

    def plan(self, fault: StreamFault | NoDone | None) -> None:
        """This will go wrong, after the tokens it names."""
        self._fault = fault

    def feed(self, n_tokens: int) -> None:
        """The engine made so many more tokens."""
        self._made += n_tokens

    def flush(self) -> None:
        """Write the new tokens as one chunk; a finished sequence also ends here."""
        if not self._open:
            return
        fault = self._fault
        limit = len(self.words)
        if fault is not None and not isinstance(fault, NoDone):
            limit = min(limit, fault.after_tokens)
        made = min(self._made, limit)
        sequence = self.sequence
        assert sequence is not None
        is_over = self._made >= len(self.words)
        if made > self._said or is_over:
            self._say(made, reason=sequence.finish_reason if is_over and fault is None else None)
        if fault is not None and made >= limit:
            self._strike(fault)
        elif is_over:
            self._close(sequence.finish_reason)

    def end(self, ending: Ending) -> None:
        """End it now, whatever was said so far."""
        if not self._open:
            return
        if self.write is not None:
            if ending == "error":
                self.write(framed_event(ENGINE_DEAD))
                self.write(DONE)
            elif ending == "abort":
                self._write(self._shape.chunk(b"", [], "abort", self._usage_if_running()))
        self._close(ending)

    def garble(self) -> None:
        """Say something else from now on: its KV is not its own."""
        self.words = [word[::-1] for word in self.words]

    def body(self, ending: Ending) -> bytes:
        """The whole answer, for a client that did not ask for a stream."""
        words = self.words[: self._said]
        reason = "abort" if ending == "empty" else ending
        return self._shape.whole(words, reason, self.usage(), self.metrics, self.kv_params)

    def usage(self) -> bytes:
        cached = self.sequence.cached_tokens if self.sequence is not None else 0
        return self._shape.usage(self._said, cached)

    def _say(self, made: int, reason: str | None) -> None:
        words = self.words[self._said : made]
        is_first = self._said == 0
        self._said = made
        if self.write is None:
            return
        if is_first and self.ask.kind == "chat":
            self._write(self._shape.role())
        if len(words) == 1 and reason is None and self._chunk_head:
            self.write(self._chunk_head + words[0] + self._chunk_tail)
        elif words or reason:
            usage = self._usage_if_running()
            said = b"".join(words)
            self._write(self._shape.chunk(said, words, reason, usage, is_first=is_first))

    def _usage_if_running(self) -> bytes | None:
        return self.usage() if self.ask.has_running_usage else None

    def _strike(self, fault: StreamFault | NoDone) -> None:
        match fault:
            case Hang():
                self._open = False  # `done` never comes: the handler waits for its client
            case Cut():
                self._finish("cut")
            case ErrorChunk():
                self.end("error")
            case Abort():
                self.end("abort")
            case NoDone():
                self._finish("stop")

    def _close(self, ending: Ending) -> None:
        if self.write is not None and ending not in ("error", "cut"):
            if self.ask.has_usage:
                self._write(self._shape.last(self.usage(), self.metrics))
            self.write(DONE)
        self._finish(ending)

    def _finish(self, ending: Ending) -> None:
        self._open = False
        if not self.done.done():
            self.done.set_result(ending)

    def _write(self, payload: bytes) -> None:
        assert self.write is not None
        self.write(framed_event(payload))


class _Shape:
    """The JSON around the words: vLLM's objects, with everything constant encoded once."""

    __slots__ = ("_ask", "_common", "_has_details", "_id", "_object")

    def __init__(
        self, ask: Ask, *, response_id: str, model: str, created: int, has_details: bool
    ) -> None:
        self._ask = ask
        self._has_details = has_details
        name = "text_completion" if ask.kind == "completion" else "chat.completion"
        self._object = name
        self._common = (
            f'"created":{created},"model":{msgspec.json.encode(model).decode()}'
        ).encode()
        self._id = msgspec.json.encode(response_id)

    def token_pieces(self) -> tuple[bytes, bytes]:
        """A framed chunk of one plain token, cut where the word goes; empty where none is constant."""
        if self._ask.has_running_usage or self._ask.returns_ids:
            return b"", b""
        marker = b" @@@"
        framed = framed_event(self.chunk(marker, [], None, None))
        head, _, tail = framed.rpartition(marker)
        return head, tail

    def chunk(
        self,
        said: bytes,
        words: list[bytes],
        reason: str | None,
        usage: bytes | None,
        *,
        is_first: bool = False,
    ) -> bytes:
        finish = b"null" if reason is None else b'"%b"' % reason.encode()
        ids = b',"token_ids":%b' % _ids(words) if self._ask.returns_ids else b""
        prompt_ids = b""
        if is_first and self._ask.returns_ids:
            prompt_ids = b',"prompt_token_ids":%b' % msgspec.json.encode(self._ask.context.ids)
        content = b'"text":"%b"' if self._ask.kind == "completion" else b'"delta":{"content":"%b"}'
        choice = b'{"index":0,%b,"logprobs":null,"finish_reason":%b,"stop_reason":null%b%b}' % (
            content % said,
            finish,
            ids,
            prompt_ids if self._ask.kind == "completion" else b"",
        )
        top = prompt_ids if self._ask.kind == "chat" else b""
        return self._chunk_object(choice, (b',"usage":%b' % usage if usage else b"") + top)

    def role(self) -> bytes:
        choice = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return self._chunk_object(choice, b"")

    def last(self, usage: bytes, metrics: dict[str, float] | None) -> bytes:
        extra = b',"usage":%b' % usage
        if metrics is not None:
            extra += b',"metrics":%b' % msgspec.json.encode(metrics)
        return self._chunk_object(b"", extra)

    def usage(self, output_tokens: int, cached_tokens: int) -> bytes:
        prompt_tokens = self._ask.context.n_tokens
        details = b'{"cached_tokens":%d}' % cached_tokens if self._has_details else b"null"
        return (
            b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,'
            b'"prompt_tokens_details":%b}'
        ) % (prompt_tokens, prompt_tokens + output_tokens, output_tokens, details)

    def whole(
        self,
        words: list[bytes],
        reason: str,
        usage: bytes,
        metrics: dict[str, float] | None,
        kv_params: bytes,
    ) -> bytes:
        said = b"".join(words)
        ids = b',"token_ids":%b' % _ids(words) if self._ask.returns_ids else b""
        if self._ask.kind == "completion":
            content = b'"text":"%b"' % said
        else:
            content = b'"message":{"role":"assistant","content":"%b"}' % said
        choice = b'{"index":0,%b,"logprobs":null,"finish_reason":"%b","stop_reason":null%b}' % (
            content,
            reason.encode(),
            ids,
        )
        extra = b',"usage":%b' % usage
        if self._ask.returns_ids:
            extra += b',"prompt_token_ids":%b' % msgspec.json.encode(self._ask.context.ids)
        if metrics is not None:
            extra += b',"metrics":%b' % msgspec.json.encode(metrics)
        if kv_params:
            extra += b',"kv_transfer_params":%b' % kv_params
        return b'{"id":%b,"object":"%b",%b,"choices":[%b]%b}' % (
            self._id,
            self._object.encode(),
            self._common,
            choice,
            extra,
        )

    def _chunk_object(self, choice: bytes, extra: bytes) -> bytes:
        name = "text_completion" if self._ask.kind == "completion" else "chat.completion.chunk"
        return b'{"id":%b,"object":"%b",%b,"choices":[%b]%b}' % (
            self._id,
            name.encode(),
            self._common,
            choice,
            extra,
        )


def framed_event(payload: bytes) -> bytes:
    """A server-sent event as one chunk of a chunked HTTP body."""
    event = b"data: %b\n\n" % payload
    return b"%x\r\n%b\r\n" % (len(event), event)


DONE = framed_event(b"[DONE]")

ENGINE_DEAD = error_body(500, "EngineCore encountered an issue.", kind="InternalServerError")


def _ids(words: list[bytes]) -> bytes:
    return msgspec.json.encode(text.ids_of(b"".join(words)))


def _response_id(ask: Ask, external_id: str) -> str:
    """What the client sees as `id`: without the number of the prompt that the engine appends."""
    return external_id.removesuffix("-0") if ask.kind == "completion" else external_id
