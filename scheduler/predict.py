"""What a request will really cost, learned one completion at a time (prior only, so far)."""

import msgspec
import numpy as np

from scheduler import cost
from scheduler.cost import Hardware
from scheduler.ledger import Rates
from scheduler.state import Floats
from scheduler.wire import Beat, Reward


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned, as plain numbers; the only part that a new leader takes over."""

    version: int = 1
    "Of this layout; another one is a cold start."
    weights: dict[str, tuple[float, ...]] = {}
    "The regression's arrays by name, row by row."
    endpoints: dict[str, tuple[float, ...]] = {}
    "By endpoint: its numbers."
    hardware: dict[str, str] = {}
    "By endpoint: what it was when that was learned."
    windows: dict[str, tuple[float, ...]] = {}
    "Recent values of every running quantile, oldest first."
    models: tuple[str, ...] = ()
    "Every model ever served here."


class Predictor:
    """Rates of every endpoint: the declared hardware's prior, corrected by what was seen."""

    def __init__(self) -> None:
        self.hardware: list[Hardware] = []
        self._prior = np.zeros((4, 0))

    def open(self, slot: int, beat: Beat) -> None:
        rates = cost.hardware(beat.hardware)
        if slot == len(self.hardware):
            self.hardware.append(rates)
            self._prior = np.column_stack([self._prior, np.zeros(4)])
        self.hardware[slot] = rates
        self._prior[:, slot] = rates.overhead_s, rates.token_s, rates.attention_s, rates.kv_s

    def close(self, slot: int) -> None:
        pass

    def rates(self, decode_kv: Floats) -> Rates:
        overhead_s, token_s, pair_s, kv_s = self._prior
        decode_s = kv_s * decode_kv
        return Rates(
            overhead_s=overhead_s + decode_s,
            token_s=token_s + decode_s / cost.CHUNK_TOKENS,
            pair_s=pair_s.copy(),
        )

    def usual_answer(self, model: str) -> tuple[int, float]:
        return 256, 0.03

    def usual_prompt(self, model: str) -> int:
        return 1024

    def spread(self, backlog_s: Floats, odds: float) -> Floats:
        return np.full(len(backlog_s), 1.0 if odds <= 0 else 0.7)

    def features(
        self, slot: int, *, tokens: float, pairs: float, decode_kv: float
    ) -> tuple[str, ...]:
        values = cost.features(
            hardware=self.hardware[slot], tokens=tokens, pairs=pairs, decode_kv=decode_kv
        )
        return tuple(f"{n}={v:.6g}" for n, v in zip(cost.FEATURES, values, strict=True))

    def learn(self, reward: Reward, slot: int) -> None:
        pass

    def speed(self, slot: int) -> float:
        return 1.0

    def error(self, slot: int) -> float:
        return 0.0

    def coverage(self, slot: int) -> float:
        return 0.0

    def export(self, models: tuple[str, ...]) -> Learned:
        return Learned(models=models)

    def restore(self, learned: Learned) -> bool:
        return learned.version == 1
