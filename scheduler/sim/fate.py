"""What really became of each request: the lab's own record, which no policy sees."""

from typing import Literal

from scheduler.sim.workload import Arrival

End = Literal["completed", "expired", "rejected", "failed", "unfinished"]


class Fate:
    """One request from its enqueue to its end. All moments are seconds of the run."""

    __slots__ = (
        "arrival",
        "attempts",
        "cached_tokens",
        "end",
        "endpoint",
        "enqueued_at",
        "finished_at",
        "first_token_at",
        "output_tokens",
        "row",
        "wasted_tokens",
        "weight",
    )

    def __init__(self, row: int, arrival: Arrival, weight: float = 1.0) -> None:
        self.row = row
        "Its place in the workload; also its request id."
        self.arrival = arrival
        self.weight = weight
        self.enqueued_at = arrival.at_s
        "When the promise's clock started; later than planned where a closed loop held it back."
        self.end: End = "unfinished"
        self.endpoint = ""
        self.attempts = 0
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.output_tokens = 0
        self.cached_tokens = 0
        self.wasted_tokens = 0
        "Computed for nobody: before a preemption, an abort or a death."

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.enqueued_at

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_at is None else self.finished_at - self.enqueued_at

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None below two tokens."""
        if self.finished_at is None or self.first_token_at is None or self.output_tokens < 2:
            return None
        return (self.finished_at - self.first_token_at) / (self.output_tokens - 1)

    @property
    def keeps_ttft(self) -> bool:
        """Whether the first token came in time; True where nothing was promised, if it came."""
        promised = self.arrival.ttft_s
        return self.ttft_s is not None and (promised is None or self.ttft_s <= promised)

    @property
    def keeps_tpot(self) -> bool:
        promised = self.arrival.tpot_s
        if self.end != "completed":
            return False
        return promised is None or self.tpot_s is None or self.tpot_s <= promised

    @property
    def keeps_e2e(self) -> bool:
        promised = self.arrival.deadline_s
        if self.end != "completed" or self.e2e_s is None:
            return False
        return promised is None or self.e2e_s <= promised

    @property
    def is_on_time(self) -> bool:
        """Completed with every promise kept."""
        return self.keeps_ttft and self.keeps_tpot and self.keeps_e2e
