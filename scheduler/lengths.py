"""What is usual of a model: running medians of its prompts, its answers and their pace.

On real traces a running median of a hundred beats a learned length, and knowing lengths exactly earns next to
nothing.
"""

import math

import msgspec

from scheduler.window import Window
from scheduler.wire.worker import Reward

ANSWER_TOKENS, ANSWER_TOKEN_S, PROMPT_TOKENS = 256, 0.03, 1024
"What is usual of a model before any answer was seen."

SIZE = 100
"Completions the medians are taken over."

MODELS_MAX = 64
"Models whose medians are kept."


class Usual(msgspec.Struct):
    """The most recent completions of one model."""

    answer: Window
    "Tokens of its answers."
    prompt: Window
    "Tokens of its prompts."
    token_s: Window
    "Seconds per token of its answers."


KINDS = Usual.__struct_fields__


class Lengths:
    """What is usual of each model, by its name."""

    def __init__(self) -> None:
        """Nothing seen."""
        self._models: dict[str, Usual] = {}

    def learn(self, reward: Reward) -> None:
        """One completed request; others say nothing of lengths."""
        if reward.outcome != "completed":
            return
        usual = self._models.get(reward.model) or self._open(reward.model)
        for seen, value in (
            (usual.answer, reward.output_tokens),
            (usual.prompt, reward.prompt_tokens),
            (usual.token_s, reward.tpot_s or 0.0),
        ):
            if 0 < value < math.inf:
                seen.add(value)

    def answer(self, model: str) -> tuple[int, float]:
        """How many tokens this model's answers usually have, and how many seconds each takes."""
        usual = self._models.get(model)
        if usual is None:
            return ANSWER_TOKENS, ANSWER_TOKEN_S
        tokens = _median(usual.answer, ANSWER_TOKENS)
        return int(tokens), _median(usual.token_s, ANSWER_TOKEN_S)

    def prompt(self, model: str) -> int:
        """How long this model's prompts usually are, for those that nobody measured."""
        usual = self._models.get(model)
        return PROMPT_TOKENS if usual is None else int(_median(usual.prompt, PROMPT_TOKENS))

    def export(self) -> dict[str, tuple[float, ...]]:
        """Every window that has something in it by name, oldest value first."""
        return {
            f"{kind}:{model}": tuple(window)
            for model, usual in self._models.items()
            for kind in KINDS
            for window in (getattr(usual, kind),)
            if len(window)
        }

    def restore(self, windows: dict[str, tuple[float, ...]]) -> None:
        """Take over windows by name; those of others are left alone."""
        for name, values in windows.items():
            kind, _, model = name.partition(":")
            if kind in KINDS:
                usual = self._models.get(model) or self._open(model)
                setattr(usual, kind, Window(SIZE, values))

    def _open(self, model: str) -> Usual:
        if len(self._models) >= MODELS_MAX:
            del self._models[next(iter(self._models))]
        usual = self._models[model] = Usual(Window(SIZE), Window(SIZE), Window(SIZE))
        return usual


def _median(seen: Window, unseen: float) -> float:
    return seen.quantile(0.5) if len(seen) else unseen
