"""One job in a worker's hands: what it is to the admission, and what is said of it at its end."""

import math

from scheduler import batching
from scheduler.batching import Candidate, Member
from scheduler.sim.fate import Fate
from scheduler.sim.fleet import Machine
from scheduler.sim.handover import Params
from scheduler.sim.sequence import Sequence
from scheduler.wire.dispatcher import Job
from scheduler.wire.worker import Reward


class Attempt:
    """A job, its sequence in the engine, and when what happened to it; all moments None before."""

    __slots__ = (
        "admitted_at",
        "expected_tokens",
        "fate",
        "first_at",
        "job",
        "pulled_at",
        "sequence",
    )

    def __init__(
        self, job: Job, sequence: Sequence, fate: Fate, *, pulled_at: float, expected_tokens: float
    ) -> None:
        self.job = job
        self.sequence = sequence
        self.fate = fate
        self.pulled_at = pulled_at
        self.expected_tokens = expected_tokens
        self.admitted_at: float | None = None
        self.first_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self.job.id}:{self.job.attempt}"

    @property
    def uncached_tokens(self) -> int:
        """What the worker believes is to be prefilled: the dispatcher's word for it."""
        if self.job.leg == "decode":
            return 1
        return max(self.job.prompt_tokens - self.job.cached_tokens, 1)

    def candidate(self) -> Candidate:
        """As one that waits, in the live worker's terms."""
        job = self.job
        return Candidate(
            prompt_tokens=job.prompt_tokens,
            uncached_tokens=self.uncached_tokens,
            output_tokens=self.expected_tokens if job.leg != "prefill" else 1.0,
            tpot_s=job.tpot_s or math.inf,
            due_at=math.inf if job.ttft_s is None else job.enqueued_at + job.ttft_s,
            held_at=self.pulled_at,
            priority=job.priority,
            weight=job.weight,
        )

    def member(self, said: int, now: float) -> Member:
        """As one that runs and has said so many tokens."""
        return batching.member(
            prompt_tokens=self.job.prompt_tokens,
            uncached_tokens=self.uncached_tokens,
            said=said,
            expected_tokens=self.expected_tokens,
            tpot_s=self.job.tpot_s,
            decoding_s=None if self.first_at is None else now - self.first_at,
        )

    def reward(self, machine: Machine, epoch: int, outcome: str, now: float) -> Reward:
        """What is said of it when it ends on this machine."""
        job, sequence, first_at = self.job, self.sequence, self.first_at
        said = sequence.output_tokens
        prefill_s = (
            None if first_at is None or self.admitted_at is None else first_at - self.admitted_at
        )
        return Reward(
            id=job.id,
            endpoint=machine.name,
            epoch=epoch,
            attempt=job.attempt,
            leg=job.leg,
            outcome=outcome,
            model=job.model,
            hardware=machine.hardware,
            decided_at=job.decided_at,
            pulled_at=self.pulled_at,
            admitted_at=self.admitted_at,
            first_token_at=first_at,
            finished_at=now,
            enqueued_at=job.enqueued_at,
            prefill_s=prefill_s,
            predicted_s=job.prefill_s,
            ttft_s=None if first_at is None else first_at - job.enqueued_at,
            tpot_s=(now - first_at) / (said - 1) if first_at is not None and said > 1 else None,
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached_tokens,
            output_tokens=said,
            on_time=self.fate.is_on_time,
            tenant=job.tenant,
            features=job.features,
            kv_params=self._params(machine.name) if outcome == "prefilled" else b"",
        )

    def _params(self, endpoint: str) -> bytes:
        """Where a prompt's KV is, for whoever will decode."""
        return Params(
            remote_engine_id=endpoint,
            remote_request_id=self.job.id,
            remote_attempt=self.job.attempt,
        ).encode()
