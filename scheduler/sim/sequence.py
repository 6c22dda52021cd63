"""One request as the engine sees it, and the line it waits in."""

from collections.abc import Iterator
from collections.abc import Sequence as Keys
from enum import Enum
from heapq import heappop, heappush
from typing import Literal

Reason = Literal["stop", "length", "abort"]
"Why a sequence ended, in vLLM's words."


class Status(Enum):
    WAITING = "waiting"
    LOADING = "loading"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Sequence:
    """A prompt, what has been computed of it, and the output that only the engine knows.

    Times are filled in as they come: `scheduled_at`, `first_token_at`, `finished_at`, all
    on the clock that `step(now)` is called with; None before.
    """

    __slots__ = (
        "arrived_at",
        "cached_tokens",
        "computed",
        "finish_reason",
        "finish_step",
        "finished_at",
        "first_token_at",
        "hands_over",
        "held",
        "id",
        "is_loaded",
        "is_remote",
        "joined_step",
        "keys",
        "max_tokens",
        "output_tokens",
        "preemptions",
        "priority",
        "prompt_tokens",
        "scheduled_at",
        "sealed",
        "status",
        "stop_after",
        "ticket",
    )

    def __init__(
        self,
        id: str,  # noqa: A002 - the engine's own word for it
        *,
        prompt_tokens: int,
        output_tokens: int,
        keys: Keys[int] = (),
        max_tokens: int | None = None,
        priority: int = 0,
        arrived_at: float = 0.0,
        hands_over: bool = False,
        is_remote: bool = False,
    ) -> None:
        """A new request.

        Args:
            id: unique among those in the engine.
            prompt_tokens: at least 1.
            output_tokens: the true length of the answer, hidden from every policy.
            keys: chained keys (>= 0) of the prompt's full blocks; they may go on over the
                output's blocks where those are known, so that a next turn finds them.
            max_tokens: ends the output early, with reason `length`; None for no such limit.
            priority: lower first, under the `priority` policy.
            arrived_at: when it reached the engine.
            hands_over: its blocks stay held after its end, for another engine to fetch.
            is_remote: another engine has computed its prompt; the KV comes over the link.

        Raises:
            ValueError: an empty prompt or an empty output.
        """
        if prompt_tokens < 1:
            raise ValueError(
                f"sequence {id!r} has {prompt_tokens} prompt tokens, at least 1 wanted"
            )
        stop_after = output_tokens if max_tokens is None else min(output_tokens, max_tokens)
        if stop_after < 1:
            raise ValueError(f"sequence {id!r} has {stop_after} output tokens, at least 1 wanted")
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.keys = keys
        self.max_tokens = max_tokens
        self.priority = priority
        self.arrived_at = arrived_at
        self.stop_after = stop_after
        self.hands_over = hands_over
        self.is_remote = is_remote
        "Once its KV was lost to a preemption it is no more: the prompt is computed here."
        self.is_loaded = False
        "Its KV has come, and its last token waits to be computed."
        self.status = Status.WAITING
        self.finish_reason: Reason = "stop" if stop_after == output_tokens else "length"
        self.computed = 0
        "Tokens whose KV exists; while decoding: when it joined the decodes."
        self.output_tokens = 0
        "Tokens generated; while decoding: when it joined the decodes."
        self.cached_tokens = 0
        "Prompt tokens found in the prefix cache when first scheduled."
        self.held: list[int] = []
        "Blocks of the prefill, by key or anonymous; decoded blocks are only counted."
        self.sealed = 0
        self.joined_step = 0
        self.finish_step = -1
        self.ticket = 0
        self.preemptions = 0
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens known so far: what a prefill must compute before the next one can be drawn."""
        return self.prompt_tokens + self.output_tokens


class Line:
    """The waiting line: in order of arrival, or of priority and then arrival.

    Leaving is lazy: an aborted sequence stays until it comes to the head.
    """

    __slots__ = ("_by_priority", "_heap", "_n_returned", "_tickets", "count")

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._heap: list[tuple[float, float, int, Sequence]] = []
        self._tickets = 0
        self._n_returned = 0
        self.count = 0

    def push(self, sequence: Sequence) -> None:
        self._tickets += 1
        sequence.ticket = self._tickets
        self._put(sequence, rank=0.0)

    def push_front(self, sequence: Sequence) -> None:
        """Back after a preemption: before all who never ran, unless priority says otherwise."""
        self._n_returned += 1
        self._put(sequence, rank=-self._n_returned)

    def peek(self) -> Sequence | None:
        heap = self._heap
        while heap:
            sequence = heap[0][3]
            if sequence.status is Status.WAITING:
                return sequence
            heappop(heap)
        return None

    def pop(self) -> Sequence:
        """Take the head, which `peek` has just shown."""
        sequence = heappop(self._heap)[3]
        self.forget()
        return sequence

    def __iter__(self) -> Iterator[Sequence]:
        """Everybody in line, in no order."""
        return (entry[3] for entry in self._heap if entry[3].status is Status.WAITING)

    def forget(self) -> None:
        """One is no longer in line; the caller has changed or will change its status."""
        self.count -= 1

    def _put(self, sequence: Sequence, rank: float) -> None:
        self.count += 1
        key = (float(sequence.priority), sequence.arrived_at) if self._by_priority else (rank, 0.0)
        heappush(self._heap, (*key, sequence.ticket, sequence))
