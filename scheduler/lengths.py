"""What is usual of a model: running medians of its prompts, its answers and their pace.

On real traces a running median of a hundred beats a learned length, and knowing lengths exactly earns next to
nothing.
"""

import math

from scheduler.window import Window
from scheduler.wire import Reward

ANSWER_TOKENS, ANSWER_TOKEN_S, PROMPT_TOKENS = 256, 0.03, 1024
"What is usual of a model before any answer was seen."

SIZE = 100
"Completions the medians are taken over."

MODELS_MAX = 64
"Models whose medians are kept."


class Lengths:
    """Windows by name and model."""

    def __init__(self) -> None:
        """Nothing seen."""
        self._windows: dict[str, Window] = {}

    def learn(self, reward: Reward) -> None:
        """One completed request; others say nothing of lengths."""
        if reward.outcome != "completed":
            return
        self._add(f"answer:{reward.model}", reward.output_tokens)
        self._add(f"prompt:{reward.model}", reward.prompt_tokens)
        self._add(f"token_s:{reward.model}", reward.tpot_s or 0.0)

    def answer(self, model: str) -> tuple[int, float]:
        """How many tokens this model's answers usually have, and how many seconds each takes."""
        tokens = self._median(f"answer:{model}", ANSWER_TOKENS)
        return int(tokens), self._median(f"token_s:{model}", ANSWER_TOKEN_S)

    def prompt(self, model: str) -> int:
        """How long this model's prompts usually are, for those that nobody measured."""
        return int(self._median(f"prompt:{model}", PROMPT_TOKENS))

    def export(self) -> dict[str, tuple[float, ...]]:
        """Every window by name, oldest value first."""
        return {name: tuple(window) for name, window in self._windows.items()}

    def restore(self, windows: dict[str, tuple[float, ...]]) -> None:
        """Take over windows by name; those of others are left alone."""
        for name, values in windows.items():
            if name.startswith(("answer:", "prompt:", "token_s:")):
                self._windows[name] = Window(SIZE, values)

    def _add(self, name: str, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            return
        if name not in self._windows:
            if len(self._windows) >= 3 * MODELS_MAX:
                del self._windows[next(iter(self._windows))]
            self._windows[name] = Window(SIZE)
        self._windows[name].add(value)

    def _median(self, name: str, unseen: float) -> float:
        seen = self._windows.get(name)
        return unseen if seen is None or not len(seen) else seen.quantile(0.5)
