"""What clients say of how long their answers will be: nothing, a real classifier's guess, or the truth.

The guess is that of a proxy model which reads the prompt and names one of five classes of length (Qiu et al.,
"Efficient interactive LLM serving with proxy model-based sequence length prediction", arXiv 2404.08509). Its published
predictions on 42,741 prompts of LMSYS-Chat-1M say how often it errs; here the same errors are drawn for other traces.
A class means as many tokens as its members' median, which a service knows from its own past.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import structs

from scheduler.sim.workload import Arrival, Workload

Lengths = Literal["unknown", "predicted", "known"]

SEED = 0
"Of the errors: every policy and every run meets the same guesses."

CONFUSION = (
    (0.840, 0.120, 0.024, 0.013, 0.003),
    (0.329, 0.511, 0.103, 0.049, 0.008),
    (0.063, 0.410, 0.378, 0.135, 0.014),
    (0.018, 0.140, 0.421, 0.393, 0.028),
    (0.013, 0.065, 0.224, 0.612, 0.086),
)
"""
Row: the fifth of all answers that the truth lies in, from the shortest. Column: the class that was guessed.

From `predictions_warmup_multi_cls_1000K.csv` of James-QiuHaoran/LLM-serving-with-proxy-models (Apache-2.0).
"""


def foreseen(arrivals: Sequence[Arrival], lengths: Lengths) -> Workload:
    """The same rows with what their clients expect of the answers.

    >>> foreseen([Arrival(at_s=0.0, prompt_tokens=1, output_tokens=7)], "known")[0].expected_tokens
    7
    """
    match lengths:
        case "unknown":
            said: list[int | None] = [None] * len(arrivals)
        case "known":
            said = [arrival.output_tokens for arrival in arrivals]
        case "predicted":
            said = [*guessed([arrival.output_tokens for arrival in arrivals])]
    return tuple(
        structs.replace(arrival, expected_tokens=tokens)
        for arrival, tokens in zip(arrivals, said, strict=True)
    )


def guessed(output_tokens: Sequence[int]) -> list[int]:
    """A guess for each answer, in the order given."""
    true = np.asarray(output_tokens)
    rng = np.random.default_rng(SEED)
    n_classes = len(CONFUSION)
    # Answers of equal length share a place, else the order of rows would tell them apart.
    place = np.searchsorted(np.sort(true), true, side="left") / max(1, len(true))
    edges = np.cumsum(np.array(CONFUSION), axis=1)[(place * n_classes).astype(int)]
    drawn = rng.random((len(true), 1)) * edges[:, -1:]
    classes = (drawn >= edges).sum(axis=1)
    usual = [
        int(np.median(true[classes == one])) if (classes == one).any() else 1
        for one in range(n_classes)
    ]
    return [usual[one] for one in classes.tolist()]
