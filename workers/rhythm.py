"""An engine's rhythm as its tokens show it: gaps, the step-time law, how long answers usually are."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from scheduler import steptime
from scheduler.cost import CHUNK_TOKENS
from scheduler.lengths import Answers
from scheduler.steptime import StepTime
from workers.attempt import Attempt
from workers.metrics import Gaps

PREFILLED_KEPT = 256
"First tokens remembered; more than one step can bring."

LATE = 0.25
"Tokens of one step arrive within this part of it; what comes later is of the next."

SMOOTH = 0.2
"What one gap weighs in the step time that beats show."


class _Sample(NamedTuple):
    """One gap and what ran during it."""

    gap_s: float
    tick: float
    batch: int
    kv_tokens: int
    prefill_tokens: int


class Rhythm:
    """One engine's. `gap` is called once a token and is kept cheap."""

    def __init__(self, hardware: str, gaps: Gaps) -> None:
        self.step_time = StepTime(steptime.prior(hardware))
        self.step_s = 0.0
        "The decode step now; 0: nothing decodes."
        self.answers = Answers()
        self._gaps = gaps
        self._prefilled: deque[tuple[float, int]] = deque(maxlen=PREFILLED_KEPT)
        "When a prompt was through, and how much of it was in that last step."
        self._sample: _Sample | None = None
        self._pacer: Attempt | None = None
        "Whose gaps are the samples: one attempt's are enough, each is a whole step."

    def first(self, attempt: Attempt, tick: float) -> None:
        """Its first token came now: the last of its prompt was in the step that just ended."""
        self._prefilled.append((tick, (attempt.uncached_tokens - 1) % CHUNK_TOKENS + 1))

    def gap(self, attempt: Attempt, gap_s: float, tick: float, running: Iterable[Attempt]) -> None:
        """Another token came, so long after the one before it."""
        self._gaps.add(gap_s)
        if self._pacer is None:
            self._pacer = attempt
        if self._pacer is attempt:
            self._settle()
            self._sample = self._seen(gap_s, tick, running)
            self.step_s = (1 - SMOOTH) * self.step_s + SMOOTH * gap_s if self.step_s else gap_s

    def left(self, attempt: Attempt, *, is_empty: bool) -> None:
        """It is no longer in the engine, which may be empty now."""
        if self._pacer is attempt:
            self._pacer = self._sample = None
        if is_empty:
            self.step_s = 0.0

    def _seen(self, gap_s: float, tick: float, running: Iterable[Attempt]) -> _Sample | None:
        """What ran during this gap; None where it is anybody's guess.

        A long prompt is computed in chunks that nothing shows. Behind it a second one fills every step to the
        brim; alone, its last chunk may be of any size.
        """
        kv_tokens = n_decoding = n_prompts = waiting_tokens = 0
        for one in running:
            if one.first_token_at is not None:
                n_decoding += 1
                kv_tokens += one.prompt_tokens + one.new_tokens
            elif one.admitted_tick < tick - gap_s:
                n_prompts += 1
                waiting_tokens += one.uncached_tokens
        is_full = n_prompts > 1 and waiting_tokens > 2 * CHUNK_TOKENS
        if not is_full and waiting_tokens > CHUNK_TOKENS:
            return None
        return _Sample(gap_s, tick, max(n_decoding, 1), kv_tokens, CHUNK_TOKENS if is_full else 0)

    def _settle(self) -> None:
        """Learn from the gap before this one: only now have all tokens of its last step arrived."""
        if self._sample is not None:
            gap_s, tick, batch, kv_tokens, prefill_tokens = self._sample
            late_s = gap_s * LATE
            computed = sum(
                tokens
                for first, tokens in self._prefilled
                if tick - gap_s + late_s < first <= tick + late_s
            )
            prefill_tokens = max(prefill_tokens, min(computed, CHUNK_TOKENS))
            self.step_time.learn(
                gap_s, batch=batch, kv_tokens=kv_tokens, prefill_tokens=prefill_tokens
            )
            while self._prefilled and self._prefilled[0][0] <= tick + late_s:
                self._prefilled.popleft()
        self._sample = None
