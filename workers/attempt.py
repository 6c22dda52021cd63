"""One attempt at a request, in a worker's hands: what it was told, what has come of it, how it is to end.

1. held      read from the endpoint's stream, its body fetched; waits outside the engine
2. running   admitted: posted to the engine, `start` sent to Redis in the same moment
3. ending    its terminal move, or its hand-back, is on the way to Redis
4. gone      Redis has answered; or it was never ours any more, and everything of it is dropped
"""

from typing import TYPE_CHECKING, Literal

import msgspec

from dispatcher.streams.sidecar import Held
from scheduler import batching
from scheduler.batching import Candidate, Member
from scheduler.slo import BYTES_PER_TOKEN
from scheduler.wire.words import Outcome
from scheduler.wire.worker import Result, Reward, Tokens
from workers.answer import Answer
from workers.body import NOTHING, Body, Written, max_tokens
from workers.halves import CLAIM

if TYPE_CHECKING:
    import asyncio

    from scheduler.wire.dispatcher import Job

Stage = Literal["held", "running", "ending", "gone"]


class Stop(msgspec.Struct, frozen=True):
    """Why an attempt was ended from outside the engine."""

    kind: Literal["fenced", "cancelled", "expired", "returned", "silent", "overrun"]
    reason: str = ""


FENCED = Stop("fenced")
OVERRUN = Stop("overrun", "the engine went on past max_tokens")
STALE = Stop("returned", "too late for its KV: the engine that keeps it may have forgotten it")


class Attempt:
    """One attempt; its endpoint is its only owner. Moments are unix seconds on Redis' clock, ticks `perf_counter`."""

    __slots__ = (
        "admitted_at",
        "admitted_tick",
        "answer",
        "body",
        "expected_tokens",
        "first_tick",
        "first_token_at",
        "gap_max_s",
        "held",
        "is_torn",
        "job",
        "kv_params",
        "last_tick",
        "pieces",
        "pulled_at",
        "stage",
        "stop",
        "task",
        "written",
    )

    def __init__(
        self, held: Held, body: Body, *, pulled_at: float, written: Written = NOTHING
    ) -> None:
        self.held = held
        self.job: Job = held.job
        self.body = body
        self.written = written
        self.pulled_at = pulled_at
        self.stage: Stage = "held"
        self.stop: Stop | None = None
        self.task: asyncio.Task[None] | None = None
        self.answer = Answer(keeps_news=held.job.stream, max_tokens=self._tokens_left)
        self.kv_params = b""
        "Where the KV is that a prefill leg has left with its engine."
        self.pieces = written.pieces
        "Pieces of text in the token log, those on their way included."
        self.is_torn = False
        "Text was dropped unwritten: nothing after it may reach the log."
        self.admitted_at: float | None = None
        self.admitted_tick = 0.0
        self.first_token_at: float | None = None
        self.first_tick = 0.0
        self.last_tick = 0.0
        self.gap_max_s = 0.0
        self.expected_tokens = 0.0
        "How long the answer will be: as its request says, else as usual; never more than the client's limit."

    @property
    def name(self) -> str:
        """As beats name it."""
        return f"{self.job.id}:{self.job.attempt}"

    @property
    def prompt_tokens(self) -> int:
        """The engine's own count, the dispatcher's, or a guess."""
        usage = self.answer.usage
        if usage is not None and usage.prompt_tokens:
            return usage.prompt_tokens
        known = self.job.prompt_tokens or len(self.job.body) // BYTES_PER_TOKEN
        return known + self.written.output_tokens

    @property
    def uncached_tokens(self) -> int:
        """What the dispatcher believes must be computed of the prompt; where its KV comes over the link, one."""
        if self.job.leg == "decode":
            return 1
        return max(self.prompt_tokens - self.job.cached_tokens, 1)

    @property
    def new_tokens(self) -> int:
        """Output of this attempt so far; before the usage has come, as far as pieces show it."""
        return (
            self.answer.output_tokens
            or self.pieces - self.written.pieces + self.answer.fresh_pieces
        )

    @property
    def output_tokens(self) -> int:
        """Output over all attempts, as the engine counts."""
        return self.answer.output_tokens + self.written.output_tokens

    def expect(self, usual_tokens: float) -> None:
        """Say how long answers usually are here; what the request says of its own goes before."""
        if self.job.leg == "prefill":
            self.expected_tokens = 1.0
            return
        limit = max_tokens(self.body)
        wanted = self.job.expected_tokens or usual_tokens
        bounded = wanted if limit is None else min(wanted, limit)
        self.expected_tokens = max(bounded - self.written.output_tokens, 1.0)

    @property
    def _tokens_left(self) -> int | None:
        """What this attempt may say at most; None: the client set no limit."""
        limit = max_tokens(self.body)
        return None if limit is None else max(limit - self.written.output_tokens, 0)

    @property
    def kv_until_at(self) -> float | None:
        """From when on the KV that it is still to fetch may be somebody else's; None: it fetches none any more."""
        return self.job.kv_until_at if self.stage == "held" else None

    def halt(self, stop: Stop) -> None:
        """End it from outside: the connection to the engine closes, which frees its seat. The first reason stays."""
        if self.stop is None:
            self.stop = stop
            if self.task is not None:
                self.task.cancel()

    def candidate(self) -> Candidate:
        """As admission sees it; moments in ticks would mean nothing there, so ages are given as they are."""
        job = self.job
        due_at = float("inf")
        if job.ttft_s is not None and not self.written.pieces:
            due_at = job.enqueued_at + job.ttft_s
        return Candidate(
            prompt_tokens=self.prompt_tokens,
            uncached_tokens=self.uncached_tokens,
            output_tokens=self.expected_tokens,
            tpot_s=job.tpot_s or float("inf"),
            due_at=due_at,
            held_at=self.pulled_at,
            priority=job.priority,
            weight=job.weight,
        )

    def member(self, tick: float) -> Member:
        """As the batch sees it."""
        return batching.member(
            prompt_tokens=self.prompt_tokens,
            uncached_tokens=self.uncached_tokens,
            said=self.new_tokens,
            expected_tokens=self.expected_tokens,
            tpot_s=self.job.tpot_s,
            decoding_s=None if self.first_token_at is None else tick - self.first_tick,
        )

    def tear(self, reason: str) -> None:
        """Drop the text that is not written yet, and hand the request back: another attempt says it again."""
        self.is_torn = True
        self.answer.forget()
        self.halt(Stop("returned", reason))

    def piece(self) -> Tokens | None:
        """The next entry of the token log; None where nothing is new."""
        if self.is_torn or not self.answer.fresh_pieces:
            return None
        text, chunks, pieces = self.answer.take()
        entry = Tokens(
            attempt=self.job.attempt,
            index=self.pieces,
            pieces=pieces,
            text=text,
            chunks=chunks,
            output_tokens=self.output_tokens,
        )
        self.pieces += pieces
        return entry

    def result(self, outcome: Outcome, reason: str, status: int, finished_at: float) -> Result:
        """The terminal record."""
        job, answer = self.job, self.answer
        is_completed = outcome == "completed"
        return Result(
            id=job.id,
            outcome=outcome,
            reason=reason,
            status=200 if is_completed else status,
            endpoint=self.held.endpoint,
            attempt=job.attempt,
            finish_reason=(answer.finish_reason or "length") if is_completed else "",
            prompt_tokens=answer.prompt_tokens(self.written),
            cached_tokens=answer.spared_tokens(job) or 0,
            output_tokens=self.output_tokens,
            enqueued_at=job.enqueued_at,
            first_token_at=self._seen_at,
            finished_at=finished_at,
            ttft_s=self._ttft_s,
            tpot_s=self._tpot_s(finished_at),
            on_time=self._is_on_time(finished_at, is_completed=is_completed),
            body=answer.response(job, self.written) if is_completed else b"",
        )

    def reward(
        self,
        outcome: Outcome | Literal["returned", "prefilled"],
        reason: str,
        finished_at: float,
        *,
        retryable: bool,
        hardware: str,
    ) -> Reward:
        """What this attempt cost."""
        job, answer = self.job, self.answer
        first_at, admitted_at = self.first_token_at, self.admitted_at
        is_half = outcome == "prefilled"  # its token is nobody's, and keeps or breaks no promise
        has_both = first_at is not None and admitted_at is not None
        prefill_s = self.first_tick - self.admitted_tick if has_both else None
        queue_ms = answer.metrics.queue_time_ms if answer.metrics else None
        # The engine's own word: no longer than we saw, whatever it says, or nobody could read the reward.
        queue_s = None if queue_ms is None else min(max(queue_ms / 1e3, 0.0), prefill_s or 0.0)
        return Reward(
            id=job.id,
            endpoint=self.held.endpoint,
            epoch=job.epoch,
            attempt=job.attempt,
            leg=job.leg,
            outcome=outcome,
            reason=reason,
            retryable=retryable,
            model=job.model,
            hardware=hardware,
            decided_at=job.decided_at,
            pulled_at=self.pulled_at,
            admitted_at=admitted_at,
            first_token_at=first_at,
            finished_at=finished_at,
            enqueued_at=job.enqueued_at,
            prefill_s=prefill_s,
            predicted_s=job.prefill_s or None,
            queue_s=queue_s,
            ttft_s=None if is_half else self._waited_s(first_at),
            tpot_s=self._own_tpot_s(),
            gap_max_s=self.gap_max_s or None,
            prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens,
            on_time=None
            if is_half
            else self._is_on_time(finished_at, is_completed=outcome == "completed"),
            tenant=job.tenant,
            features=job.features,
            kv_params=CLAIM if is_half else b"",
        )

    @property
    def _seen_at(self) -> float | None:
        """When the client's first token came, from whichever attempt."""
        return self.written.first_token_at or self.first_token_at

    @property
    def _ttft_s(self) -> float | None:
        return self._waited_s(self._seen_at)

    def _waited_s(self, at: float | None) -> float | None:
        """Since it was enqueued; never less than nothing, though Redis' clock went back meanwhile."""
        return None if at is None else max(0.0, at - self.job.enqueued_at)

    def _tpot_s(self, finished_at: float) -> float | None:
        """Over all attempts, their gap included: that is what the client saw."""
        if self._seen_at is None or self.output_tokens < 2:
            return None
        if self.written.first_token_at is None:
            return self._own_tpot_s()
        return (finished_at - self._seen_at) / (self.output_tokens - 1)

    def _own_tpot_s(self) -> float | None:
        said = self.answer.output_tokens
        return (self.last_tick - self.first_tick) / (said - 1) if said > 1 else None

    def _is_on_time(self, finished_at: float, *, is_completed: bool) -> bool | None:
        job = self.job
        kept = [
            is_completed and found is not None and found <= promised
            for promised, found in (
                (job.ttft_s, self._ttft_s),
                (job.tpot_s, self._tpot_s(finished_at) or 0.0),
                (job.deadline_at, finished_at),
            )
            if promised is not None
        ]
        return all(kept) if kept else None
