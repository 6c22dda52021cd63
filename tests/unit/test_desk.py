"""What the door takes a request for that has ended by the time it was handed in."""

import pytest

from dispatcher.client.awaited import Awaited
from dispatcher.client.handle import Handle
from dispatcher.door.desk import _is_spent
from scheduler.wire.worker import Result


@pytest.mark.parametrize(
    ("is_found", "outcome", "is_spent"),
    [
        pytest.param(True, "failed", True, id="an earlier try failed"),
        pytest.param(True, "completed", False, id="an earlier try was answered"),
        pytest.param(False, "failed", False, id="ours failed at once"),
    ],
)
def test_only_an_earlier_try_can_be_spent(is_found, outcome, is_spent):
    """What we sent ourselves is answered with its own refusal, however soon that is here."""
    handle = Handle(None, "r1", Awaited(Result(id="r1", outcome=outcome)))
    handle.is_found = is_found

    assert _is_spent(handle) == is_spent
