"""What a dispatcher counts of the rewards that it reads."""

from dispatcher.metrics import Meter
from scheduler.wire.worker import Reward


def reward(leg, outcome, attempt, cached_tokens):
    return Reward(
        id="r1",
        endpoint="e0",
        epoch=1,
        attempt=attempt,
        leg=leg,
        outcome=outcome,
        prompt_tokens=100,
        cached_tokens=cached_tokens,
    )


def test_what_was_reused_of_a_prompt_is_what_its_computing_found():
    """To the engine that decodes all that it fetched may be cached; that is a transfer, and no hit."""
    meter = Meter()
    meter.event(reward("prefill", "prefilled", 1, 64), now=1.0)
    meter.event(reward("decode", "completed", 2, 99), now=2.0)
    assert (meter.reused_tokens, meter.prompt_tokens) == (64, 100)
    meter.event(reward("whole", "completed", 1, 32), now=3.0)
    assert (meter.reused_tokens, meter.prompt_tokens) == (96, 200)
