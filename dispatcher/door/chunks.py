"""A token log as OpenAI's stream of chunks, in vLLM's shape.

    role        once a choice, before its first word (chats)
    deltas      text as it was logged; the engine's own chunks where they carry more than text
    finish      one a choice, with its reason, when the terminal record says so
    usage       where it was asked for
    [DONE]

Finish reasons come from the terminal record alone: until it is written another attempt may go on.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from dispatcher.client.handle import Piece
from dispatcher.door.ask import Ask
from dispatcher.door.refusal import Refusal
from scheduler.wire.worker import Result

DONE = b"data: [DONE]\n\n"

_MARK = b" @@@"
"What no JSON text holds unescaped next to a quote we wrote: where the text goes in a chunk made once."

Fields = dict[str, Any]


class Chunks:
    """One answer's chunks. `piece` what was logged, then `end` or `broken`."""

    def __init__(self, ask: Ask, *, request_id: str, created: int) -> None:
        """Every chunk bears this id, the model as asked for and this moment (unix seconds)."""
        self._ask = ask
        self._id = f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{request_id}"
        self._created = created
        self._begun: set[int] = set()
        framed = self._chunk([self._choice(0, text=_MARK.decode())])
        self._head, _, self._tail = framed.rpartition(_MARK)

    def piece(self, piece: Piece) -> bytes:
        """The events of one entry of the log."""
        if not piece.chunks:
            return self._text(piece.text)
        return b"".join(self._mixed(piece.text, _parsed(piece.chunks)))

    def end(self, record: Result) -> bytes:
        """The events after the last word of an answer that is complete."""
        answer = _parsed_answer(record)
        choices = answer.get("choices") or [{"finish_reason": record.finish_reason or "stop"}]
        said = b"" if self._begun else b"".join(self._whole(choice) for choice in choices)
        finish = b"".join(self._finish(choice) for choice in choices)
        usage = self._chunk([], usage=_usage(answer, record)) if self._ask.has_usage else b""
        return said + finish + usage + DONE

    def broken(self, refusal: Refusal) -> bytes:
        """The events of an answer that ends here without being complete."""
        return b"data: " + refusal.body() + b"\n\n" + DONE

    def _text(self, text: str) -> bytes:
        if not text:
            return b""
        # Without its quotes: they stand in the head and the tail.
        return self._begin(0) + self._head + msgspec.json.encode(text)[1:-1] + self._tail

    def _mixed(self, text: str, chunks: list[Fields]) -> Iterator[bytes]:
        """Text and rich chunks of one entry, in their order as far as the text tells it.

        `text` holds what the rich chunks say as well. Where a rich chunk says nothing, what it holds decides:
        reasoning comes before the text, all else (tool calls) after it.
        """
        rest = text
        silent = [chunk for chunk in chunks if not _said(chunk)]
        for chunk in (one for one in silent if _is_reasoning(one)):
            yield self._rich(chunk)
        for chunk in (one for one in chunks if _said(one)):
            before, _, rest = rest.partition(_said(chunk))
            yield self._text(before)
            yield self._rich(chunk)
        yield self._text(rest)
        for chunk in (one for one in silent if not _is_reasoning(one)):
            yield self._rich(chunk)

    def _rich(self, chunk: Fields) -> bytes:
        """One of the engine's chunks, under our id and without what only the worker asked for."""
        choices = []
        roles = b""
        for choice in chunk.get("choices") or []:
            roles += self._begin(int(choice.get("index", 0)))
            kept = {name: value for name, value in choice.items() if name not in self._hidden}
            choices.append(kept | {"finish_reason": None, "stop_reason": None})
        return roles + self._chunk(choices)

    @property
    def _hidden(self) -> tuple[str, ...]:
        return () if self._ask.returns_ids else ("token_ids", "prompt_token_ids")

    def _begin(self, index: int) -> bytes:
        """The role chunk, once a choice."""
        if index in self._begun:
            return b""
        self._begun.add(index)
        if not self._ask.is_chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self._chunk(
            [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        )

    def _whole(self, choice: Fields) -> bytes:
        """A choice that was not logged as it came, in one piece."""
        index = int(choice.get("index", 0))
        message = choice.get("message") or {}
        delta = {name: value for name, value in message.items() if name != "role" and value}
        for number, call in enumerate(delta.get("tool_calls", ())):
            call.setdefault("index", number)
        one = self._choice(index, text=choice.get("text") or "")
        if self._ask.is_chat:
            one["delta"] = delta
        return self._begin(index) + self._chunk([one | {"logprobs": choice.get("logprobs")}])

    def _finish(self, choice: Fields) -> bytes:
        index = int(choice.get("index", 0))
        ending = {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
        return self._begin(index) + self._chunk([self._choice(index, text="") | ending])

    def _choice(self, index: int, *, text: str) -> Fields:
        content: Fields = {"delta": {"content": text}} if self._ask.is_chat else {"text": text}
        return {
            "index": index,
            **content,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }

    def _chunk(self, choices: list[Fields], **more: Fields) -> bytes:
        name = "chat.completion.chunk" if self._ask.is_chat else "text_completion"
        head = {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._ask.model,
            "choices": choices,
        }
        return b"data: " + msgspec.json.encode(head | more) + b"\n\n"


def _parsed(chunks: str) -> list[Fields]:
    found = msgspec.json.decode(chunks)
    assert isinstance(found, list)
    return found


def _parsed_answer(record: Result) -> Fields:
    found = msgspec.json.decode(record.body or b"{}")
    return found if isinstance(found, dict) else {}


def _said(chunk: Fields) -> str:
    """The words of the first choice, which the log's text holds too."""
    for choice in chunk.get("choices") or []:
        if choice.get("index", 0) == 0:
            return str((choice.get("delta") or {}).get("content") or choice.get("text") or "")
    return ""


def _is_reasoning(chunk: Fields) -> bool:
    deltas = [choice.get("delta") or {} for choice in chunk.get("choices") or []]
    return any(delta.get("reasoning") or delta.get("reasoning_content") for delta in deltas)


def _usage(answer: Fields, record: Result) -> Fields:
    return answer.get("usage") or {
        "prompt_tokens": record.prompt_tokens,
        "total_tokens": record.prompt_tokens + record.output_tokens,
        "completion_tokens": record.output_tokens,
    }
