"""What a promise is made of."""

import numpy as np
import pytest

from scheduler import slo
from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import WireError
from scheduler.events import Arrived, Assign
from scheduler.slo import Objective
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat

CHAT = {"chat": Objective(priority=2, ttft_ms=500.0, deadline_ms=9000.0)}


def test_explicit_fields_override_the_named_objective_part_by_part():
    """What the request says itself wins; the rest is the objective's."""
    made = slo.promise(Request(model="m", objective="chat", ttft_s=0.2), 100.0, CHAT)

    assert (made.ttft_s, made.deadline_at, made.priority) == (0.2, 109.0, 2)


def test_the_earlier_of_two_deadlines_holds():
    """A duration and a moment may both be given."""
    made = slo.promise(Request(model="m", deadline_s=5.0, deadline_at=103.0), 100.0, {})

    assert made.deadline_at == 103.0


def test_an_unknown_objective_names_what_exists():
    """The reason is for the one who has to mend it."""
    with pytest.raises(WireError, match="'chatt', wanted one of: chat"):
        slo.promise(Request(model="m", objective="chatt"), 0.0, CHAT)


@pytest.mark.parametrize(
    ("fields", "decode_s", "expected"),
    [
        pytest.param({}, 9.0, slo.NO_PROMISE, id="nothing promised"),
        pytest.param({"ttft_s": 1.0}, 9.0, 101.0, id="the first token alone"),
        pytest.param({"deadline_s": 10.0}, 4.0, 106.0, id="the answer's time is set apart"),
        pytest.param({"deadline_s": 10.0}, 60.0, 105.0, id="but never more than half"),
        pytest.param({"ttft_s": 2.0, "deadline_s": 10.0}, 9.0, 102.0, id="the earlier counts"),
    ],
)
def test_due_is_the_last_good_moment_of_the_first_token(fields, decode_s, expected):
    """A deadline for the whole answer is one for its first token, earlier by the answer's time."""
    made = slo.promise(Request(model="m", **fields), 100.0, {})

    assert slo.due_at(made, 100.0, decode_s) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"prompt_tokens": 7, "body": b"x" * 400}, 7, id="as said"),
        pytest.param({"body": b"x" * 400}, 100, id="four bytes a token"),
        pytest.param({"body": b"x"}, 1, id="never none"),
        pytest.param({}, 333, id="a claim check: as usual"),
    ],
)
def test_prompt_length_is_said_or_estimated(fields, expected):
    """The dispatcher never parses a body."""
    assert slo.prompt_tokens(Request(model="m", **fields), usual=333) == expected


@pytest.mark.parametrize(
    ("own_s", "objective", "expected"),
    [
        pytest.param(None, "", None, id="it waits"),
        pytest.param(0.5, "", 100.5, id="its own"),
        pytest.param(0.5, "patient", 100.5, id="shorter than its objective's"),
        pytest.param(60.0, "patient", 102.0, id="never longer than its objective's"),
    ],
)
def test_the_shorter_queue_holds(own_s, objective, expected):
    """A request may be less patient than its objective, never more."""
    named = {"patient": Objective(max_queue_ms=2000.0)}
    request = Request(model="m", objective=objective, max_queue_s=own_s)

    assert slo.promise(request, 100.0, named).refuse_at == expected


def test_a_weight_reaches_whoever_admits():
    """Named in an objective, it rides in the job: the worker's batch counts it too."""
    core = Scheduler(
        CoreSettings(objectives={"gold": Objective(weight=3.0)}), np.random.default_rng(0)
    )
    core.receive(Beat(endpoint="e", epoch=1, models=("m",)), 0.0)
    request = Request(id="r", model="m", prompt_tokens=10, objective="gold")
    core.receive(Arrived(request=request, entry="1-0", enqueued_at=0.0), 0.0)

    [job] = [c.job for c in core.decide(0.0) if isinstance(c, Assign)]

    assert job.weight == 3.0
