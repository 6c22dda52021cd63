"""What is usual of a model: running medians of its prompts, its answers and their pace.

On real traces a running median of a hundred beats a learned length, and knowing lengths exactly earns next to
nothing.
"""

import math
import statistics
from collections import deque

import msgspec

from scheduler.window import Window
from scheduler.wire.worker import Reward

ANSWER_TOKENS, ANSWER_TOKEN_S, PROMPT_TOKENS = 256, 0.03, 1024
"What is usual of a model before any answer was seen."

SIZE = 100
"Completions the medians are taken over."

ENGINE_TOKENS, ENGINE_SIZE = 200.0, 256
"Of one engine, for its worker: an answer before any was seen (the mean of public chat traces), and how many are kept."

MODELS_MAX = 64
"Models whose medians are kept."


class Answers:
    """How long one engine's answers usually are, as its worker sees them."""

    def __init__(self) -> None:
        """None seen."""
        self.usual_tokens = ENGINE_TOKENS
        "Their median of late."
        self._seen: deque[int] = deque(maxlen=ENGINE_SIZE)

    def add(self, output_tokens: int) -> None:
        """An answer ended by itself after so many tokens."""
        self._seen.append(output_tokens)
        self.usual_tokens = statistics.median(self._seen)


class Recent(msgspec.Struct):
    """The most recent completions of one model."""

    answer: Window
    "Tokens of its answers."
    prompt: Window
    "Tokens of its prompts."
    token_s: Window
    "Seconds per token of its answers."


KINDS = Recent.__struct_fields__


class Lengths:
    """What is usual of each model, by its name."""

    def __init__(self) -> None:
        """Nothing seen."""
        self._models: dict[str, Recent] = {}

    def learn(self, reward: Reward) -> None:
        """One completed request; others say nothing of lengths."""
        if reward.outcome != "completed":
            return
        recent = self._models.get(reward.model) or self._open(reward.model)
        for seen, value in (
            (recent.answer, reward.output_tokens),
            (recent.prompt, reward.prompt_tokens),
            (recent.token_s, reward.tpot_s or 0.0),
        ):
            if 0 < value < math.inf:
                seen.add(value)

    def answer(self, model: str) -> tuple[int, float]:
        """How many tokens this model's answers usually have, and how many seconds each takes."""
        recent = self._models.get(model)
        if recent is None:
            return ANSWER_TOKENS, ANSWER_TOKEN_S
        tokens = _median(recent.answer, ANSWER_TOKENS)
        return int(tokens), _median(recent.token_s, ANSWER_TOKEN_S)

    def prompt(self, model: str) -> int:
        """How long this model's prompts usually are, for those that nobody measured."""
        recent = self._models.get(model)
        return PROMPT_TOKENS if recent is None else int(_median(recent.prompt, PROMPT_TOKENS))

    def export(self) -> dict[str, tuple[float, ...]]:
        """Every window that has something in it by name, oldest value first."""
        return {
            f"{kind}:{model}": tuple(window)
            for model, recent in self._models.items()
            for kind in KINDS
            for window in (getattr(recent, kind),)
            if len(window)
        }

    def restore(self, windows: dict[str, tuple[float, ...]]) -> None:
        """Take over windows by name; those of others are left alone."""
        for name, values in windows.items():
            kind, _, model = name.partition(":")
            if kind in KINDS:
                recent = self._models.get(model) or self._open(model)
                setattr(recent, kind, Window(SIZE, values))

    def _open(self, model: str) -> Recent:
        if len(self._models) >= MODELS_MAX:
            del self._models[next(iter(self._models))]
        recent = self._models[model] = Recent(Window(SIZE), Window(SIZE), Window(SIZE))
        return recent


def _median(seen: Window, unseen: float) -> float:
    return seen.quantile(0.5) if len(seen) else unseen
