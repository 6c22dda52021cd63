"""Who decodes together next: admission to the continuous batch of one engine.

A decode step costs every member the same time, and that time grows with the KV tokens it reads, so one long
request slows all. A held request may join if it keeps its own promise there and breaks nobody's: the bound is a step
time, not a count of seats. The rest wait outside, where their order can still change.

Nobody is kept out for want of KV blocks: that is the dispatcher's account, and whoever it was mistaken about has the
blocks as soon as they are free if it waits in the engine, and a turn of everybody later if it waits here.

The order among the held: who has waited past patience, then priority, then who can still keep its promise, then
the most worth for the KV tokens and steps it will hold. The same functions serve the worker and the simulator.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from scheduler.state import Floats
from scheduler.steptime import Law

CONSIDERED_MAX = 64
"Held requests looked at in one call: bounded work, and no engine starts more than that in one step."


class Member(msgspec.Struct, frozen=True):
    """A request inside the engine, as the worker sees it."""

    context_tokens: int
    "Prompt and output so far: what each step reads for it."

    remaining_tokens: float
    "Output still expected."

    tpot_s: float = math.inf
    "Its promise; `inf`: none."

    banked_s: float = 0.0
    "How far it is ahead of that promise: tokens so far times `tpot_s`, less the time they took."

    prefill_tokens: float = 0.0
    "Prompt tokens still to compute; 0 once it decodes."


def member(
    *,
    prompt_tokens: int,
    uncached_tokens: int,
    said: int,
    expected_tokens: float,
    tpot_s: float | None,
    decoding_s: float | None,
) -> Member:
    """A request inside the engine, from what its worker knows.

    Args:
        prompt_tokens: all of its prompt.
        uncached_tokens: what of it is believed to be computed.
        said: output tokens so far.
        expected_tokens: of the whole answer.
        tpot_s: its promise; None: none.
        decoding_s: since its first token; None: that has not come.
    """
    return Member(
        context_tokens=prompt_tokens + said,
        # Past its expected end an answer goes on for about a quarter of what it has said: lengths are heavy-tailed.
        remaining_tokens=max(expected_tokens - said, said / 4, 1.0),
        tpot_s=tpot_s or math.inf,
        banked_s=(said - 1) * tpot_s - decoding_s if tpot_s and decoding_s is not None else 0.0,
        prefill_tokens=0.0 if decoding_s is not None else uncached_tokens,
    )


class Candidate(msgspec.Struct, frozen=True):
    """A request that waits outside the engine."""

    prompt_tokens: int
    "All of its prompt: what it will occupy."

    uncached_tokens: float
    "What of it must be computed."

    output_tokens: float
    "Output expected; no server knows the true one."

    tpot_s: float = math.inf
    "Its promise; `inf`: none."

    due_at: float = math.inf
    "When its first token must be there; `inf`: no promise."

    held_at: float = 0.0
    "Since when it waits here."

    weight: float = 1.0
    "What keeping its promise is worth."

    priority: int = 0
    "Higher first."

    @property
    def kv_seconds(self) -> float:
        """KV tokens it holds, times the steps for which it holds them: its price, in token steps."""
        context = max(self.prompt_tokens + self.output_tokens / 2, 1.0)
        return context * max(self.output_tokens, 1.0)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds the batch besides its members' promises."""

    seats: int = 256
    "The engine's `max_num_seqs`; never exceeded, whatever is predicted."

    step_s: float = math.inf
    "The operator's own cap on the step: fewer raw tokens a second for more promises kept."

    margin: float = 0.05
    "Part of every promise that is held back for what the law does not know."

    patience_s: float = 5.0
    "Who has waited longer goes first, and nobody overtakes it."


def admit(
    running: Sequence[Member],
    held: Sequence[Candidate],
    law: Law,
    limits: Limits,
    now: float,
) -> list[int]:
    """Which of the held may enter the engine now, in the order of entering, as indices of `held`.

    Never more than the seats. An empty batch always takes one, so nothing waits for ever; a member that will miss
    its promise anyway binds nobody.

    >>> law = Law(base_s=0.010, sequence_s=0.001, kv_s=0.0, prefill_s=0.0)
    >>> chat = Candidate(prompt_tokens=10, uncached_tokens=0, output_tokens=10, tpot_s=0.0135)
    >>> admit([], [chat] * 5, law, Limits(margin=0.0), now=0.0)
    [0, 1, 2]
    """
    assert limits.seats > 0
    room = limits.seats - len(running)
    if room <= 0 or not held:
        return []
    joined: list[int] = []
    load = _Load(running, law, limits)
    line = order(held, load.prefill_tokens, law, now, patience_s=limits.patience_s)
    for index in line[:CONSIDERED_MAX]:
        if len(joined) == room:
            break
        candidate = held[index]
        if load.batch == 0 or load.can_join(candidate, now):
            load.join(candidate, now)
            joined.append(index)
        elif now - candidate.held_at > limits.patience_s:
            break  # it has waited long enough: nobody passes it any more
    return joined


def order(
    held: Sequence[Candidate], prefill_tokens: float, law: Law, now: float, *, patience_s: float
) -> list[int]:
    """Indices of the held in the order in which they should enter."""

    def place(index: int) -> tuple[bool, float, bool, float, float, int]:
        one = held[index]
        is_patient = now - one.held_at <= patience_s
        return (
            is_patient,
            -one.priority if is_patient else one.held_at,
            not is_feasible(one, prefill_tokens, law, now),
            -one.weight / one.kv_seconds,
            one.held_at,
            index,
        )

    return sorted(range(len(held)), key=place)


def is_feasible(one: Candidate, prefill_tokens: float, law: Law, now: float) -> bool:
    """Whether its first token can still come in time behind this much prefill."""
    wait_s = law.base_s + law.prefill_s * (prefill_tokens + one.uncached_tokens)
    return now + wait_s <= one.due_at


class _Load:
    """The batch as it would be: the running and those who have joined in this call."""

    def __init__(self, running: Sequence[Member], law: Law, limits: Limits) -> None:
        self._law, self._limits = law, limits
        self._keep = 1.0 - limits.margin
        self.batch = len(running)
        self.prefill_tokens = self._read = 0.0
        self._members: list[tuple[float, float, float, float]] = []
        "Of each: context, what remains, its promise (`inf`: none), and how far it is ahead of that."
        self._columns: Floats | None = None
        "The same as columns; None: nobody asked, or somebody has joined since."
        self._is_bound = False
        "Whether anybody was promised a pace."
        for one in running:
            self.prefill_tokens += one.prefill_tokens
            self._enter(one.context_tokens, one.remaining_tokens, one.tpot_s, one.banked_s)

    def can_join(self, one: Candidate, now: float) -> bool:
        """Whether it keeps its own pace here, and breaks no promise per token that would hold without it."""
        law, limits = self._law, self._limits
        is_lost = not is_feasible(one, self.prefill_tokens, law, now)
        # What it cannot keep at all is no reason to wait.
        own_s = one.tpot_s
        if is_lost or own_s < law.step_s(1, one.prompt_tokens):
            own_s = math.inf
        if limits.step_s == own_s == math.inf and not self._is_bound:
            return True
        step_s = law.step_s(self.batch + 1, self._read_beside(one))
        return step_s <= min(limits.step_s, own_s * self._keep) and not self._breaks(step_s)

    def _breaks(self, step_s: float) -> bool:
        """Whether a promise per token holds now and would not at this step time.

        A promise is a mean over the whole answer: who is ahead of it may be slowed for the rest. Who will miss it
        anyway, behind the prompts that are in the engine already, keeps nobody out. Nor does it count that the
        newcomer's own prompt stalls them: it has to be computed, and whoever is there then waits for it.
        """
        if not self._is_bound:
            return False
        law, (_, remaining, tpot, ahead) = self._law, self._by_column()
        ahead_s = ahead - law.prefill_s * self.prefill_tokens
        allowed = tpot * self._keep + ahead_s / np.maximum(remaining, 1.0)
        holds = allowed >= law.step_s(self.batch, self._read)
        return bool((holds & (allowed < step_s)).any())

    def _read_beside(self, one: Candidate) -> float:
        """KV tokens that a step reads with the newcomer: now, or in the mean over its stay if that is more.

        Contexts grow while it decodes, until their answers end; who takes those places is judged when he comes.
        """
        context, remaining = self._by_column()[:2]
        stay = max(one.output_tokens, 1.0)
        beside = np.minimum(remaining, stay)
        mean = float(((context + beside / 2) * beside).sum()) / stay + stay / 2
        return one.prompt_tokens + max(self._read, mean)

    def join(self, one: Candidate, now: float) -> None:
        is_lost = not is_feasible(one, self.prefill_tokens, self._law, now)
        tpot_s = math.inf if is_lost else one.tpot_s
        self.batch += 1
        self.prefill_tokens += one.uncached_tokens
        self._enter(one.prompt_tokens, one.output_tokens, tpot_s)

    def _enter(self, context: float, remaining: float, tpot_s: float, ahead_s: float = 0.0) -> None:
        self._read += context
        self._members.append((context, remaining, tpot_s, ahead_s))
        self._columns = None
        self._is_bound = self._is_bound or tpot_s < math.inf

    def _by_column(self) -> Floats:
        if self._columns is None:
            self._columns = np.array(self._members, dtype=np.float64).reshape(-1, 4).T
        return self._columns
