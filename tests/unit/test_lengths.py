"""What is usual of a model is the median of its latest completions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.lengths import (
    ANSWER_TOKEN_S,
    ANSWER_TOKENS,
    MODELS_MAX,
    PROMPT_TOKENS,
    SIZE,
    Lengths,
)
from scheduler.window import Window
from scheduler.wire.worker import Reward

VALUES = st.lists(st.integers(1, 99), min_size=1, max_size=30)


def completed(model: str = "m", **fields: object) -> Reward:
    said = {"prompt_tokens": 30, "output_tokens": 20, "tpot_s": 0.01, **fields}
    return Reward(
        id="r", endpoint="e", epoch=1, attempt=1, model=model, **{"outcome": "completed", **said}
    )


@given(values=VALUES, size=st.integers(1, 9), part=st.floats(0, 1), asked=st.integers(0, 99))
def test_a_window_is_its_last_values_sorted(values, size, part, asked):
    """Quantiles and shares as if made anew, whatever has left it."""
    window, last = Window(size), values[-size:]
    for value in values:
        window.add(value)

    assert (list(window), len(window)) == (last, len(last))
    assert window.quantile(part) == sorted(last)[min(len(last) - 1, int(part * len(last)))]
    assert window.share(asked) == sum(value <= asked for value in last) / len(last)


@given(values=st.lists(st.integers(1, 999), min_size=1, max_size=SIZE + 20))
def test_the_usual_is_the_median_of_late(values):
    """Of answers, prompts and pace alike; each model's own, and the same after a restart."""
    made = Lengths()
    for value in values:
        made.learn(completed(prompt_tokens=2 * value, output_tokens=value, tpot_s=value / 1000))
    made.learn(completed("other"))
    again = Lengths()
    again.restore(made.export())

    last = sorted(values[-SIZE:])
    median = last[len(last) // 2]
    for one in (made, again):
        assert one.answer("m") == (median, median / 1000)
        assert one.prompt("m") == 2 * median
        assert (one.answer("other"), one.prompt("other")) == ((20, 0.01), 30)


@pytest.mark.parametrize(
    "fields",
    [
        {"outcome": "failed"},
        {"prompt_tokens": 0, "output_tokens": 0, "tpot_s": None},
        {"prompt_tokens": 0, "output_tokens": 0, "tpot_s": math.nan},
        {"prompt_tokens": 0, "output_tokens": -5, "tpot_s": math.inf},
    ],
)
def test_what_says_nothing_of_lengths_teaches_none(fields):
    """As if nobody had come: what is usual of any model is taken."""
    made = Lengths()

    made.learn(completed(**fields))

    assert (made.answer("m"), made.prompt("m")) == (
        (ANSWER_TOKENS, ANSWER_TOKEN_S),
        PROMPT_TOKENS,
    )


def test_models_are_bounded():
    """I8: names that clients make up displace the oldest, and no more are kept."""
    made = Lengths()
    for number in range(MODELS_MAX + 1):
        made.learn(completed(f"m{number}"))

    assert made.prompt("m0") == PROMPT_TOKENS
    assert made.prompt("m1") == made.prompt(f"m{MODELS_MAX}") == 30
    assert len(made.export()) == 3 * MODELS_MAX
