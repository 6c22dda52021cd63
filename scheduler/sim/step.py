"""What an engine says back: a step with its tokens, and its counters."""

import msgspec

from scheduler.sim.sequence import Sequence


class Counters:
    """What an engine counts since its start; the emulated `/metrics` shows them."""

    __slots__ = (
        "generation_tokens",
        "preemptions",
        "prefix_hits",
        "prefix_queries",
        "prompt_tokens",
        "steps",
    )

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        "Tokens looked up in the prefix cache."
        self.prefix_hits = 0
        "Tokens found there."
        self.preemptions = 0


class Step(msgspec.Struct, kw_only=True):
    """One turn of the engine, or several equal ones when `until` let it leap.

    Everything in it becomes true at `ends[-1]`: tokens exist only when their step is over.
    """

    started_at: float

    ends: list[float] = []
    "When each step ended; one entry unless it leapt."

    new_tokens: int = 0
    "Tokens computed in the (last) step."

    decoded: list[Sequence] = []
    "Each gained one token a step, in the order they began to decode."

    prefilled: list[Sequence] = []
    "Finished their prompt in this step and gained one token, mostly their first."

    finished: list[Sequence] = []

    scheduled: list[Sequence] = []
    "Left the waiting line in this step."

    preempted: list[Sequence] = []

    @property
    def n_steps(self) -> int:
        return len(self.ends)

    @property
    def ended_at(self) -> float:
        return self.ends[-1]

    @property
    def duration_s(self) -> float:
        return self.ends[-1] - self.started_at
