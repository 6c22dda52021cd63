"""One choice of a streamed answer, put together from its pieces as in an answer that is not streamed."""

from scheduler.errors import EngineError
from workers.chunk import Choice, Fields


class Accumulator:
    """One choice so far."""

    __slots__ = (
        "finish_reason",
        "logprobs",
        "prompt_token_ids",
        "reasoning",
        "refusal",
        "stop_reason",
        "text",
        "token_ids",
        "tools",
    )

    def __init__(self, finish_reason: str = "") -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.tools: dict[object, Fields] = {}
        self.logprobs: Fields = {}
        self.token_ids: list[int] = []
        self.prompt_token_ids: list[int] | None = None
        self.finish_reason = finish_reason
        self.stop_reason: int | str | None = None

    def add(self, choice: Choice) -> bool:
        """Take in what is more than text; whether there was any."""
        is_rich = bool(choice.token_ids)
        delta = choice.delta
        if delta is not None:
            reasoning = delta.reasoning or delta.reasoning_content
            if reasoning:
                self.reasoning.append(reasoning)
                is_rich = True
            if delta.refusal:
                self.refusal.append(delta.refusal)
                is_rich = True
            for call in delta.tool_calls or ():
                _merge_call(self.tools.setdefault(_place(call), {}), call)
                is_rich = True
        if choice.logprobs:
            _extend(self.logprobs, choice.logprobs)
            is_rich = True
        return is_rich

    def add_ids(self, choice: Choice) -> None:
        """Take in tokens as numbers, which an answer has where they were asked for."""
        self.token_ids += choice.token_ids or ()
        self.prompt_token_ids = self.prompt_token_ids or choice.prompt_token_ids

    def choice(self, index: int, before: str, *, is_chat: bool) -> Fields:
        """As it stands in a whole response; `before` is what earlier attempts wrote of it."""
        text = before + "".join(self.text)
        content: Fields = {"message": self._message(text)} if is_chat else {"text": text}
        return {
            "index": index,
            **content,
            "logprobs": self.logprobs or None,
            "finish_reason": self.finish_reason or None,
            "stop_reason": self.stop_reason,
            **({"token_ids": self.token_ids} if self.token_ids else {}),
            **({"prompt_token_ids": self.prompt_token_ids} if self.prompt_token_ids else {}),
        }

    def _message(self, text: str) -> Fields:
        message: Fields = {"role": "assistant", "content": text or (None if self.tools else "")}
        if self.reasoning:
            message["reasoning"] = message["reasoning_content"] = "".join(self.reasoning)
        if self.refusal:
            message["refusal"] = "".join(self.refusal)
        if self.tools:
            message["tool_calls"] = list(self.tools.values())
        return message


def _place(call: Fields) -> int:
    index = call.get("index", 0)
    if not isinstance(index, int):
        raise EngineError(f"a tool call's index is {str(index)[:80]!r}, wanted a number")
    return index


def _merge_call(known: Fields, more: Fields) -> None:
    """One tool call's pieces: names and ids come once, arguments bit by bit."""
    for key, value in more.items():
        if key == "index" or value is None:
            continue
        if isinstance(value, dict):
            inner = known.setdefault(key, {})
            if not isinstance(inner, dict):
                raise EngineError(
                    f"a tool call's {key[:80]!r} was {str(inner)[:80]!r}, is an object"
                )
            _merge_call(inner, value)
        elif key == "arguments":
            known[key] = str(known.get(key, "")) + str(value)
        else:
            known[key] = value


def _extend(known: Fields, more: Fields) -> None:
    for key, value in more.items():
        before = known.get(key)
        if isinstance(before, list) and isinstance(value, list):
            before.extend(value)
        elif before is None:
            known[key] = value
