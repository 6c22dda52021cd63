"""Nobody starves: whatever was promised, however many urgent ones come for ever after, whoever waits is served."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Arrived, Assign
from scheduler.policies import Urgency
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

STEP_S, PREFILL_S = 0.25, 0.26
"One endpoint that is through with one request a step, of the two that come."

WAITER = st.tuples(
    st.sampled_from([None, 0.001, 0.5]), st.sampled_from([-2, 0]), st.integers(500, 12_000)
)


class Flood:
    """A core whose one endpoint is asked for twice what it can do."""

    def __init__(self, policy: Urgency) -> None:
        self.core = Scheduler(CoreSettings(policy=policy), np.random.default_rng(0))
        self.now, self.count = 100.0, 0
        self.flying: list[Assign] = []
        self.served: list[str] = []

    def ask(self, name: str, ttft_s: float | None, priority: int, tokens: int) -> None:
        self.count += 1
        request = Request(
            id=name, model="m", prompt_tokens=tokens, ttft_s=ttft_s, priority=priority
        )
        arrived = Arrived(request=request, entry=f"{self.count}-0", enqueued_at=self.now)
        self.core.receive(arrived, self.now)

    def step(self) -> None:
        for _ in range(2):
            self.ask(f"urgent{self.count}", 1.0, 0, 4000)
        self.now += STEP_S
        beat = Beat(endpoint="e0", epoch=1, models=("m",), hardware="a100")
        self.core.receive(beat, self.now)
        self.flying += [c for c in self.core.decide(self.now) if isinstance(c, Assign)]
        if self.flying:
            job = self.flying.pop(0).job
            self.served.append(job.id)
            reward = Reward(
                id=job.id, endpoint="e0", epoch=1, attempt=1, outcome="completed", model="m",
                prefill_s=PREFILL_S, features=job.features,
            )  # fmt: skip
            self.core.receive(reward, self.now)


@settings(max_examples=15)
@given(waiters=st.lists(WAITER, min_size=1, max_size=3))
def test_whoever_waits_is_served_in_an_endless_overload(waiters):
    """Ageing past the bands for those without promise, the aside share for those set aside; oldest first."""
    flood = Flood(Urgency(patience_s=10.0, stretch=1.0, aside_share=0.05))
    for at, (ttft_s, priority, tokens) in enumerate(waiters):
        flood.ask(f"waiter{at}", ttft_s, priority, tokens)

    for _ in range(400):
        flood.step()

    assert {f"waiter{at}" for at in range(len(waiters))} <= set(flood.served)
