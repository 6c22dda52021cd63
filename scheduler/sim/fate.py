"""What really became of each request: the lab's own record, which no policy sees."""

from typing import Literal

import numpy as np

from scheduler.sim import tempo
from scheduler.sim.workload import Arrival
from scheduler.state import Floats

End = Literal["completed", "expired", "rejected", "cancelled", "failed", "unfinished"]


class Fate:
    """One request from its enqueue to its end. All moments are seconds of the run."""

    __slots__ = (
        "arrival",
        "attempts",
        "believed_tokens",
        "best_tokens",
        "cached_tokens",
        "end",
        "endpoint",
        "enqueued_at",
        "finished_at",
        "first_token_at",
        "gap_max_s",
        "gap_worst_s",
        "has_late_token",
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
        self.best_tokens = 0
        "Of its prompt, what stood in the fullest cache for it when it was assigned."
        self.believed_tokens = 0
        "Of its prompt, what whoever decided thought to be in that endpoint's cache."
        self.wasted_tokens = 0
        "Computed for nobody: before a preemption, an abort or a death."
        self.gap_max_s: float | None = None
        "The longest time between two tokens; None below two tokens, as the next."
        self.gap_worst_s: float | None = None
        "Mean of the longest tenth of its gaps."
        self.has_late_token = False
        "A token came after its own due moment, see `tell`."

    def tell(self, moments: Floats) -> None:
        """When the tokens of the attempt that counts came; float64[n_tokens].

        The n-th token after the first is due n times the promised TPOT after the moment that was promised for the
        first, or after the first where none was: what a reader who begins then, at that pace, never waits for.
        """
        if len(moments) < 2:
            return
        gaps_s = np.diff(moments)
        self.gap_max_s = float(gaps_s.max())
        self.gap_worst_s = tempo.worst_s(gaps_s)
        ttft_s, tpot_s = self.arrival.ttft_s, self.arrival.tpot_s
        if tpot_s is not None:
            begin = float(moments[0]) if ttft_s is None else self.enqueued_at + ttft_s
            self.has_late_token = bool((moments > begin + tpot_s * np.arange(len(moments))).any())

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
    def keeps_tokens(self) -> bool:
        """Whether every token came by its own due moment."""
        return self.end == "completed" and self.keeps_ttft and not self.has_late_token

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
