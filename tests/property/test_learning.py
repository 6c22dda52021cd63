"""Lessons are taken in eight at a time; whoever asks sees what one at a time would have given."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.regression import SOLVE_ALL, SOLVE_EVERY, DecayedRegression, Sums

SECONDS = st.floats(1e-3, 10.0)
LESSONS = st.lists(
    st.tuples(st.tuples(SECONDS, SECONDS, SECONDS), SECONDS, st.floats(1e-2, 1e3)),
    max_size=SOLVE_ALL + 3 * SOLVE_EVERY,
)
DECAY, PRIOR = 0.99, 0.1


def one_at_a_time(lessons):
    """The definition: decay, the prior's share, and the lesson itself."""
    mean = np.ones(3)
    precision, moment = PRIOR * np.eye(3), PRIOR * mean
    for x, y, weight in lessons:
        row = np.array(x)
        precision = DECAY * precision + (1 - DECAY) * PRIOR * np.eye(3)
        precision += weight * np.outer(row, row)
        moment = DECAY * moment + (1 - DECAY) * PRIOR * mean + weight * y * row
    return precision, moment


@given(lessons=LESSONS)
def test_lessons_in_one_are_lessons_in_turn(lessons):
    """Also in the middle of eight, and looking changes nothing: the same precision, moment and weights."""
    curious, silent = (DecayedRegression(np.ones(3), PRIOR, DECAY) for _ in range(2))
    for lesson in lessons:
        curious.learn_row(*lesson)
        silent.learn_row(*lesson)
        assert (curious.precision == curious.precision.T).all()

    precision, moment = one_at_a_time(lessons)
    assert silent.precision == pytest.approx(precision, rel=1e-9, abs=1e-12)
    assert silent.moment == pytest.approx(moment, rel=1e-9, abs=1e-12)
    assert curious.weights == silent.weights


@given(lessons=LESSONS.filter(len))
def test_the_weights_are_those_of_the_last_solution(lessons):
    """Each of the first lessons is solved, then one in eight: between these nothing moves."""
    made = DecayedRegression(np.ones(3), PRIOR, DECAY)
    for lesson in lessons:
        made.learn_row(*lesson)
    solved = len(lessons) - max(0, len(lessons) - SOLVE_ALL) % SOLVE_EVERY

    again = DecayedRegression(np.ones(3), PRIOR, DECAY)
    precision, moment = one_at_a_time(lessons[:solved])
    sums = Sums(precision=tuple(precision.ravel()), moment=tuple(moment), weights=(1.0,) * 3)
    again.restore(sums)

    assert made.weights == pytest.approx(again.solve(), rel=1e-6, abs=1e-9)
