"""Whom a worker lets into its engine: `batching.admit`, with what the live worker has learned and knows."""

from collections.abc import Callable, Iterable, Sequence

from scheduler import batching, steptime
from scheduler.batching import Limits
from scheduler.lengths import Answers
from scheduler.sim.attempt import Attempt
from scheduler.sim.fleet import Machine
from scheduler.sim.sequence import Sequence as Prompt
from scheduler.sim.step import Step
from scheduler.steptime import StepTime

LEARN_ALL = 256
"Steps that all teach the law, which is then known within a percent; after them one in `LEARN_EVERY`, to save us time."

LEARN_EVERY = 8


class Admission:
    """What decides, and what it learns: the time of a step, and how long answers are."""

    def __init__(self, machine: Machine, *, is_open: bool) -> None:
        """Before anything was seen; where it `is_open`, whoever comes goes in, and nothing is learned."""
        self.answers = Answers()
        self._is_open = is_open
        self._law = StepTime(steptime.prior(machine.hardware))
        self._limits = Limits(seats=machine.settings.max_num_seqs)
        self._n_steps = 0

    def restart(self) -> None:
        """The engine is new; what was learned of this machine stands."""
        self._n_steps = 0

    def chosen(
        self,
        running: Iterable[Attempt],
        held: Sequence[Attempt],
        said: Callable[[Prompt], int],
        now: float,
    ) -> list[int]:
        """Which of the held may enter, by their place; `said` tells how many tokens a running one has."""
        if self._is_open:
            return list(range(len(held)))
        return batching.admit(
            [attempt.member(said(attempt.sequence), now) for attempt in running],
            [attempt.candidate() for attempt in held],
            self._law.law,
            self._limits,
            now,
        )

    def learn(self, step: Step, *, kv_tokens: int) -> None:
        """A step is over, whose decodes read so many KV tokens."""
        self._n_steps += 1
        if self._is_open or not step.decoded:
            return
        if self._n_steps > LEARN_ALL and self._n_steps % LEARN_EVERY:
            return
        self._law.learn(
            step.duration_s / step.n_steps,
            batch=len(step.decoded),
            kv_tokens=kv_tokens,
            prefill_tokens=step.new_tokens - len(step.decoded),
        )

    def ended(self, output_tokens: int) -> None:
        """An answer was so long."""
        if not self._is_open:
            self.answers.add(output_tokens)
