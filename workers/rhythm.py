"""An engine's rhythm as its tokens show it: gaps, the step-time law, how long answers usually are."""

import statistics
from collections import deque
from collections.abc import Iterable

from scheduler.batch import Limits
from scheduler.cost import CLASSES, UNKNOWN
from scheduler.steptime import Law, StepTime
from workers.attempt import Attempt
from workers.metrics import Gaps

LENGTHS_KEPT = 256
"Answers whose length says what is usual."

USUAL_TOKENS = 200.0
"How long an answer is before any was seen: the mean of public chat traces."

SMOOTH = 0.2
"What one gap weighs in the step time that beats show."


class Rhythm:
    """One engine's. `gap` is called once a token and is kept cheap."""

    def __init__(self, hardware: str, gaps: Gaps) -> None:
        self.step_time = StepTime(_prior(hardware))
        self.step_s = 0.0
        "The decode step now; 0: nothing decodes."
        self.usual_tokens = USUAL_TOKENS
        self._gaps = gaps
        self._lengths: deque[int] = deque(maxlen=LENGTHS_KEPT)
        self._pacer: Attempt | None = None
        "Whose gaps are the samples: one attempt's are enough, each is a whole step."

    def gap(self, attempt: Attempt, gap_s: float, running: Iterable[Attempt]) -> None:
        """Another token came after so long."""
        self._gaps.add(gap_s)
        if self._pacer is None:
            self._pacer = attempt
        if self._pacer is attempt:
            self._learn(gap_s, running)

    def left(self, attempt: Attempt, *, is_empty: bool) -> None:
        """It is no longer in the engine, which may be empty now."""
        if self._pacer is attempt:
            self._pacer = None
        if is_empty:
            self.step_s = 0.0

    def said(self, output_tokens: int) -> None:
        """An answer ended by itself after so many tokens."""
        self._lengths.append(output_tokens)
        self.usual_tokens = statistics.median(self._lengths)

    def _learn(self, gap_s: float, running: Iterable[Attempt]) -> None:
        kv_tokens = prefill_tokens = n_decoding = 0
        for one in running:
            if one.first_token_at is None:
                prefill_tokens += max(one.prompt_tokens - one.job.cached_tokens, 0)
            else:
                n_decoding += 1
                kv_tokens += one.prompt_tokens + one.new_tokens
        self.step_time.learn(
            gap_s,
            batch=max(n_decoding, 1),
            kv_tokens=kv_tokens,
            prefill_tokens=min(prefill_tokens, Limits().chunk_tokens),
        )
        self.step_s = (1 - SMOOTH) * self.step_s + SMOOTH * gap_s if self.step_s else gap_s


def _prior(hardware: str) -> Law:
    """The data sheet's law of this class of hardware, until the engine has shown its own."""
    known = CLASSES.get(hardware, UNKNOWN)
    return Law(known.step_s, known.sequence_s, known.kv_s, known.token_s)
