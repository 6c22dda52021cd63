"""An engine's streamed answer: parsed chunk by chunk, judged at its end, put together as one response.

A success has a finish reason of an engine that has ended, and tokens by the engine's own count. A 200 proves nothing:
errors, aborts and empty answers of draining engines all come inside one.
"""

from http import HTTPStatus

import msgspec

from scheduler.errors import UNREADABLE, EngineError
from scheduler.wire.dispatcher import Job
from workers import chunk as chunks
from workers.accumulator import Accumulator
from workers.body import CHAT, NOTHING, Written
from workers.chunk import Choice, Chunk, Fault, Fields, Times, Usage
from workers.halves import NO_KV

GOOD = frozenset({"stop", "length", "tool_calls", "repetition"})
"Finish reasons of an answer that is one; the last where `repetition_detection` was asked for."

EVENT_BYTES = 16 * 2**20
"The longest event; an engine that sends more without an end has lost its wits."

ANSWER_BYTES = 128 * 2**20
"The longest answer that is kept: a million tokens with the log probabilities of each; Redis takes 512 MB in one field."

OVERRUN_TOKENS = 16
"""So many more than were asked for are taken: what comes in one piece with the last, and pieces that are no token.

An engine that says more does not know its limit, and would go on to the end of its context.
"""

BLAMES_REQUEST = frozenset({400, 405, 413, 415, 422})
"Statuses that would come from any engine for the same request; 404 is a model that another may serve."


REASON_CHARS = 1000
"What is passed on of an engine's own words: they go into results, logs and beats."


class Answer:
    """What an engine has said so far. `feed` it the bytes as they come, then `check` and ask for the `response`."""

    def __init__(self, *, keeps_news: bool = True, max_tokens: int | None = None) -> None:
        """`max_tokens` is what each choice may have; None: what the engine thinks right."""
        self._keeps_news = keeps_news
        self._pieces_max = float("inf") if max_tokens is None else max_tokens + OVERRUN_TOKENS
        self._pieces = 0
        "Of the whole answer: no more than it has tokens, but for a few."
        self.is_done = False
        "[DONE] has come."
        self.usage: Usage | None = None
        self.metrics: Times | None = None
        self.finish_reason = ""
        self.fresh_text: list[str] = []
        "Pieces of text since `take`."
        self.fresh_chunks: list[bytes] = []
        "Chunks as they came, since `take`, where one of them held more than text."
        self.fresh_pieces = 0
        self.fresh_bytes = 0
        "About what these hold in memory."
        self._bytes = 0
        "The same of the whole answer."
        self._rest: list[bytes] = []
        "What has come of an event that has not ended; put together once it has, or each packet of a long one would copy it all."
        self._rest_bytes = 0
        self._seam = b""
        "Its last bytes, with which the next may end it."
        self._error: Fault | None = None
        self._head: Chunk | None = None
        self._choices: dict[int, Accumulator] = {}

    @property
    def output_tokens(self) -> int:
        """By usage, never by chunks."""
        return self.usage.completion_tokens if self.usage else 0

    def feed(self, data: bytes) -> bool:
        """Take in what the engine sent; True if any of it was a piece of the answer.

        Raises:
            EngineError: it is not a stream of chunks.
        """
        if self._rest and (data := self._whole(data)) == b"":
            return False
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, rest = data.split(b"\n\n")
        self._rest = [rest] if rest else []
        self._rest_bytes, self._seam = len(rest), rest[-3:]
        before = self.fresh_pieces
        for event in events:
            if self.is_done:
                break  # as clients do: behind [DONE] nothing is of this answer
            if event[:5] == b"data:" and b"\n" not in event:
                self._event(event[5:])
            elif payload := _payload(event):
                self._event(payload)
        if self._bytes > ANSWER_BYTES:
            raise EngineError(f"an answer of over {ANSWER_BYTES} bytes")
        return self.fresh_pieces > before

    def _whole(self, data: bytes) -> bytes:
        """The event that this ends, and what follows; nothing where it goes on."""
        self._rest.append(data)
        self._rest_bytes += len(data)
        if self._rest_bytes > EVENT_BYTES:
            raise EngineError(f"an event of over {EVENT_BYTES} bytes")
        seam = self._seam + data
        self._seam = seam[-3:]
        return b"".join(self._rest) if b"\n\n" in seam or b"\n\r\n" in seam else b""

    def take(self) -> tuple[str, str, int]:
        """The text, the chunks as a JSON list (or nothing) and the number of pieces since the last time."""
        text = "".join(self.fresh_text)
        # In fields that nobody here reads there may be bytes that are no text.
        joined = b"[" + b",".join(self.fresh_chunks) + b"]" if self.fresh_chunks else b""
        chunks = joined.decode(errors="replace")
        pieces = self.fresh_pieces
        self.forget()
        return text, chunks, pieces

    def forget(self) -> None:
        """Drop what is new; another attempt will say it again."""
        self.fresh_text.clear()
        self.fresh_chunks.clear()
        self.fresh_pieces = self.fresh_bytes = 0

    @property
    def is_overrun(self) -> bool:
        """Whether it goes on though it has had all the tokens that were asked for; at most a few too many are here."""
        said = max(self._pieces, self.output_tokens)
        return said > self._pieces_max * max(len(self._choices), 1) and not self.is_done

    def cut(self, prompt_tokens: int) -> None:
        """Nothing follows: it is as long as it may be. How long its prompt is the engine may not have said yet."""
        for said in self._choices.values():
            said.finish_reason = said.finish_reason or "length"
        self.finish_reason = self.finish_reason or "length"
        self.usage = self.usage or Usage(prompt_tokens, self._pieces)

    def check(self, written: Written = NOTHING) -> None:
        """Refuse whatever is no success.

        Raises:
            EngineError: says what was wrong, and whether another attempt may do better.
        """
        if self._error is not None:
            raise refusal(self._error.status, self._error.message)
        rest = b"".join(self._rest).strip()
        if rest and not self.is_done and rest != b"data: [DONE]":
            raise _cut_off(rest)
        if not self.finish_reason:
            last = "ended with [DONE]" if self.is_done else "broke off"
            raise EngineError(f"the stream {last} without a finish reason")
        for said in self._choices.values():
            if said.finish_reason not in GOOD:
                found = said.finish_reason[:80]
                raise EngineError(f"finish reason is {found!r}, wanted stop or length")
        if self.output_tokens + written.output_tokens <= 0:
            raise EngineError("the answer has no tokens")

    def prompt_tokens(self, written: Written = NOTHING) -> int:
        """The client's own prompt: what was continued is output, not prompt."""
        return max(self.usage.prompt_tokens - written.output_tokens, 0) if self.usage else 0

    @property
    def cached_tokens(self) -> int | None:
        """As the engine says; None where it does not."""
        details = self.usage.prompt_tokens_details if self.usage else None
        return details.cached_tokens if details else None

    def spared_tokens(self, job: Job) -> int | None:
        """Of the prompt, what nobody had to compute, as the engine says that computed the rest; None where it does not.

        To one that has fetched a prompt's KV, all of it may be cached.
        """
        is_fetched = job.leg == "decode" and job.kv_params != NO_KV
        return job.kv_cached_tokens if is_fetched else self.cached_tokens

    def response(self, job: Job, written: Written = NOTHING) -> bytes:
        """The answer as the engine would have sent it whole, what earlier attempts wrote included."""
        head = self._head or Chunk()
        prompt_ids = None if self._keeps_news else head.prompt_token_ids
        is_chat = job.path == CHAT
        prompt_tokens = self.prompt_tokens(written)
        output_tokens = self.output_tokens + written.output_tokens
        usage: Fields = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "completion_tokens": output_tokens,
        }
        spared_tokens = self.spared_tokens(job)
        if spared_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": min(spared_tokens, prompt_tokens)}
        details = self.usage.completion_tokens_details if self.usage else None
        if details is not None and not written.pieces:  # of the whole answer, or of nothing
            usage["completion_tokens_details"] = details
        self._choices = self._choices or {0: Accumulator("length")}
        return msgspec.json.encode(
            {
                "id": head.id or job.id,
                "object": "chat.completion" if is_chat else "text_completion",
                "created": head.created,
                "model": head.model or job.model,
                "choices": [
                    said.choice(index, written.text if index == 0 else "", is_chat=is_chat)
                    for index, said in sorted(self._choices.items())
                ],
                "usage": usage,
            }
            | ({"prompt_token_ids": prompt_ids} if prompt_ids else {})
        )

    def _event(self, payload: bytes) -> None:
        try:
            chunk = chunks.decode(payload)
        except UNREADABLE as error:
            if payload.strip() == b"[DONE]":
                self.is_done = True
                return
            raise EngineError(f"a chunk cannot be read ({error}): {payload[:80]!r}") from None
        if chunk.usage is not None:
            self.usage = chunk.usage
        if self._head is None or chunk.error is not None or chunk.metrics is not None:
            self._frame(chunk)
        has_piece = is_rich = False
        for choice in chunk.choices or ():
            text = choice.delta.content if choice.delta else choice.text
            is_more = self._said(choice, text)
            has_piece = has_piece or is_more or bool(text)
            is_rich = is_rich or is_more
        if has_piece:
            self._pieces += 1
            self.fresh_pieces += 1
            self.fresh_bytes += len(payload)
        if is_rich:
            self._bytes += len(payload)
            if self._keeps_news:
                self.fresh_chunks.append(payload.strip())

    def _frame(self, chunk: Chunk) -> None:
        """What comes once in an answer."""
        if self._head is None and chunk.id:
            self._head = chunk
        if chunk.metrics is not None:
            self.metrics = chunk.metrics
        if chunk.error is not None:
            self._error = _fault(chunk.error)

    def _said(self, choice: Choice, text: str | None) -> bool:
        """Take in a choice's part of a chunk; whether it is more than text of the first choice."""
        said = self._choices.get(choice.index)
        if said is None:
            said = self._choices[choice.index] = Accumulator()
        if text:
            said.text.append(text)
            self._bytes += len(text)
            if choice.index == 0 and self._keeps_news:
                self.fresh_text.append(text)
        if choice.finish_reason:
            said.finish_reason = choice.finish_reason
            said.stop_reason = choice.stop_reason
            self.finish_reason = choice.finish_reason
        if not self._keeps_news:  # a log holds them, and may have been begun by an earlier attempt
            said.add_ids(choice)
        return said.add(choice) or choice.index > 0


def _payload(event: bytes) -> bytes:
    """What the lines of an event say; comments, and fields that are not data, are passed over."""
    parts = []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            parts.append(value)
        elif name.strip() not in (b"", b"event", b"id", b"retry"):
            raise EngineError(f"garbage in the stream: {event[:80]!r}")
    return b"\n".join(parts)


def _cut_off(rest: bytes) -> EngineError:
    """A stream that ended inside this; some engines and gateways say so what is wrong, and no stream at all."""
    try:
        fault = chunks.decode(rest).error
    except UNREADABLE:
        fault = None
    if fault is None:
        return EngineError(f"the stream ended inside {rest[:80]!r}")
    fault = _fault(fault)
    return refusal(fault.status, fault.message)


def _fault(error: Fault | str) -> Fault:
    return Fault(message=error) if isinstance(error, str) else error


def refusal(status: int, message: str | None) -> EngineError:
    """An engine's error, and whether the request itself is to blame."""
    what = (message or "")[:REASON_CHARS] or (
        HTTPStatus(status).phrase if status in set(HTTPStatus) else "an error without words"
    )
    return EngineError(what, retryable=status not in BLAMES_REQUEST, status=status)


def fault_in(data: bytes) -> str:
    """The message in an error body, whichever of its shapes it has."""
    try:
        body = msgspec.json.decode(data)
    except UNREADABLE:
        return data[:200].decode(errors="replace")
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error or "")[:REASON_CHARS]
