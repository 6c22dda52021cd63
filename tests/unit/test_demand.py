"""What it costs those to come if an endpoint is taken: by Erlang's formula, for as long as they cannot wait."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.demand import COUNT_MAX, SPAN_S, Demand

CAME = st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 5)), max_size=30)


def demand(*, every_s: float, work_s: float, spare_s: float, seconds: float = SPAN_S) -> Demand:
    """A steady stream, from 0 on."""
    made = Demand(0.0)
    for at in np.arange(0.0, seconds, every_s).tolist():
        made.add(work_s, spare_s, at)
    return made


def test_the_last_is_missed_by_nearly_everybody():
    """Four a second, half a second each, nobody can wait: of three endpoints one second breaks so many promises."""
    made = demand(every_s=0.25, work_s=0.5, spare_s=0.0)

    broken = made.broken(np.ones(3), SPAN_S)

    # Erlang's B of 2: 1, 2/3, 2/5, 4/19. The first would be missed too, and is free all the same.
    assert broken == pytest.approx([0.0, 4 * (2 / 3 - 2 / 5), 4 * (1 - 2 / 3)])


def test_nothing_is_broken_for_who_can_wait():
    """Only the seconds beyond what they can wait for count."""
    made = demand(every_s=0.25, work_s=0.5, spare_s=2.0)

    assert made.broken(np.full(2, 2.0), SPAN_S) == pytest.approx([0.0, 0.0])
    assert made.broken(np.full(2, 3.0), SPAN_S)[1] > 1.0


def test_what_came_is_forgotten():
    """After a span without any nobody is expected."""
    made = demand(every_s=0.25, work_s=0.5, spare_s=0.0)

    assert made.broken(np.ones(2), 2 * SPAN_S)[1] == 0.0


def test_more_than_is_remembered_is_as_often():
    """A thousand a second are a thousand a second, though only some hundreds are kept."""
    made = demand(every_s=0.001, work_s=0.0001, spare_s=0.0, seconds=1 + COUNT_MAX / 1000)

    assert made.broken(np.ones(2), 1 + COUNT_MAX / 1000)[1] > 0.2 * COUNT_MAX


@given(came=CAME, taken_s=st.lists(st.floats(0, 20), min_size=1, max_size=6))
def test_no_more_is_broken_than_comes(came, taken_s):
    """At least nothing, at most everybody who comes and cannot wait; the first is always free."""
    made = Demand(0.0)
    for at, (work_s, spare_s) in enumerate(came):
        made.add(work_s, spare_s, at / 10)

    broken = made.broken(np.array(taken_s), 10.0)

    stopped = [sum(max(0.0, one - spare_s) for _, spare_s in came) / 10 for one in taken_s]
    assert broken[0] == 0.0
    assert all(0.0 <= one <= most + 1e-9 for one, most in zip(broken, stopped, strict=True))
    assert not any(map(math.isnan, broken))
