"""How long one step of an engine takes, fitted while it runs.

    T_step = base + sequence * B + kv * (KV tokens read) + prefill * (prompt tokens of the step)

The gap between two tokens of a running request is one step, so every streamed token is a sample. Old samples
fade, the prior never quite does: where the load has not varied (a batch of always one cannot tell `base` from
`sequence`) the prior decides, and one wild sample moves nothing. Only the prior's shape is believed: how fast the
engine is as a whole the first few gaps say, for hardware that nobody declared may be five times slower.
"""

import math

import msgspec
import numpy as np

from scheduler import cost
from scheduler.state import Floats

SCALES = np.array([1.0, 16.0, 16_384.0, 512.0])
"Typical size of each term's input, so that the four coefficients are of one magnitude (normalisation)."

MEMORY = 0.995
"What a sample still weighs one sample later: half after 140 steps, a few seconds of decoding."

PRIOR_SAMPLES = 4.0
"What the prior's shape weighs in samples at first."

PRIOR_MEMORY, PRIOR_FLOOR = 0.97, 0.01
"It fades faster than the samples do, to a hundredth: enough to decide what the load never varied."

FLOOR = 8.0
"No coefficient falls below the prior at its level over this: a KV term of zero would unbind the batch."

LEVEL_SAMPLES = 32
"The level is a mean over about so many samples."

CLIP = 4.0
"A sample further than this factor from the law counts as this far: stalls and coalesced tokens are not steps."

CLIP_AFTER = 16
"Samples before that guard is up: until then the prior may be wrong by more than the factor."

SOLVE_EVERY = 8
"Samples between two solutions; one costs some 40 us."

STEP_MAX_S = 60.0
"A longer gap is not a step but an engine in trouble."

ERROR_MEMORY = 0.98
"How slowly the shown error forgets."


class Law(msgspec.Struct, frozen=True):
    """The four coefficients, in seconds; none is negative.

    >>> round(Law(0.010, 0.001, 0.0, 0.0).step_s(3), 6)
    0.013
    """

    base_s: float = 0.010
    "An empty step: reading the weights."

    sequence_s: float = 5e-5
    "Each sequence in it."

    kv_s: float = 1e-7
    "Each token of context that is read."

    prefill_s: float = 1e-4
    "Each prompt token computed in it."

    def step_s(self, batch: int, kv_tokens: float = 0.0, prefill_tokens: float = 0.0) -> float:
        """Predicted seconds of one step."""
        return (
            self.base_s
            + self.sequence_s * batch
            + self.kv_s * kv_tokens
            + self.prefill_s * prefill_tokens
        )


def prior(hardware: str) -> Law:
    """The law of a declared class of hardware by its data sheet, until the engine has shown its own."""
    rates = cost.hardware(hardware)
    return Law(
        base_s=rates.step_s,
        sequence_s=rates.sequence_s,
        kv_s=rates.kv_s,
        prefill_s=rates.token_s,
    )


class StepTime:
    """The law of one engine as it is known now. `learn` from every gap; `law` may be read at any time."""

    def __init__(self, prior: Law = Law()) -> None:  # noqa: B008 - frozen
        self.law = prior
        self.samples = 0
        self.error = 0.0
        "Recent mean of |predicted - measured| / measured."
        self._prior = _vector(prior)
        self._level = 0.0
        "The log of how many times slower than its prior the engine is."
        self._weight = np.diag(PRIOR_SAMPLES / np.maximum(self._prior, 1e-4) ** 2)
        self._moments = np.zeros((4, 4))
        self._targets = np.zeros(4)

    def learn(
        self, measured_s: float, *, batch: int, kv_tokens: float, prefill_tokens: float = 0.0
    ) -> None:
        """Take one gap into account, with what ran during it.

        Gaps that cannot be a step (not positive, or over a minute) are left out.
        """
        if not 0.0 < measured_s <= STEP_MAX_S or batch < 1:
            return
        predicted_s = self.law.step_s(batch, kv_tokens, prefill_tokens)
        if self.samples >= CLIP_AFTER:
            measured_s = min(max(measured_s, predicted_s / CLIP), predicted_s * CLIP)
        off = abs(predicted_s - measured_s) / measured_s
        self.error = (
            off if self.samples == 0 else ERROR_MEMORY * self.error + (1 - ERROR_MEMORY) * off
        )
        self.samples += 1
        inputs = np.array([1.0, batch, kv_tokens, prefill_tokens]) / SCALES
        slower = math.log(measured_s / float(inputs @ self._prior))
        self._level += (slower - self._level) / min(self.samples, LEVEL_SAMPLES)
        self._add(measured_s, inputs)
        if self.samples % SOLVE_EVERY == 0 or self.samples < CLIP_AFTER:
            self._solve()

    def _add(self, measured_s: float, inputs: Floats) -> None:
        # Relative error: a step of 200 ms must not outweigh twenty of 10 ms.
        weight = 1.0 / measured_s**2
        self._moments *= MEMORY
        self._moments += np.outer(inputs, inputs) * weight
        self._targets *= MEMORY
        self._targets += inputs * (measured_s * weight)

    def _solve(self) -> None:
        """Least squares with the prior as a few samples more; no coefficient falls below its floor."""
        level = math.exp(self._level)
        prior, floor = level * self._prior, level / FLOOR * self._prior
        weight = self._weight * (max(PRIOR_MEMORY**self.samples, PRIOR_FLOOR) / level**2)
        left = self._moments + weight
        right = self._targets + weight @ prior - left @ floor
        free = [0, 1, 2, 3]
        solution = np.zeros(4)
        while free:
            part = np.linalg.solve(left[np.ix_(free, free)], right[free])
            if (part >= 0.0).all():
                solution[free] = part
                break
            free.pop(int(part.argmin()))
        if np.isfinite(solution).all():
            self.law = Law(*((solution + floor) / SCALES).tolist())


def _vector(law: Law) -> Floats:
    parts: Floats = np.array([law.base_s, law.sequence_s, law.kv_s, law.prefill_s])
    scaled: Floats = parts * SCALES
    return scaled
