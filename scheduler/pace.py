"""What one more decode costs, and where: predicted seconds per output token, learned from every answer's own.

    seconds per token = speed[endpoint] * weights . (step, sequences, KV read, share of time that prefill takes)

All four terms are in seconds under the declared hardware, so untaught weights are one. Prefill stretches every
token: an engine that prefills for a third of its time decodes in the other two.
"""

import math
from collections.abc import Iterable, Sequence
from operator import mul

import msgspec
import numpy as np

from scheduler import regression
from scheduler.cost import Hardware
from scheduler.regression import DecayedRegression, Sums
from scheduler.speed import Speeds
from scheduler.spread import LOGISTIC
from scheduler.state import Floats
from scheduler.window import Window

TERMS = 4

PREFILL_S = 5.0
"Over how long the share of time that prefill takes is averaged."

SHARE_MAX = 0.8
"The largest share of prefill believed."

LATELY_S = 8.0
"Over how long the pace of late is averaged: about as long as an answer in a chat takes."

SPREAD_SIZE, SPREAD_LEAST = 300, 30
COLD_SIGMA, SIGMA_MIN = 0.2, 0.05
"How far off predictions are before enough answers were seen to know, and at least."

STEEPNESS, Z_MIN, Z_MAX = np.array(-LOGISTIC), np.array(-20.0), np.array(20.0)
WHOLE = np.array(1.0)
"As arrays: numpy takes as long again to make one of a number."


class Load(msgspec.Struct, frozen=True):
    """The pace everywhere if one sequence more joins, and what each KV token that it brings adds; float64[n_slots]."""

    joined_s: Floats
    "Seconds per token with one sequence more that reads nothing."

    sequence_s: Floats
    "Of that, what one sequence adds."

    token_s: Floats
    "What each KV token that it reads adds."

    alone_s: Floats
    "Seconds per token of a sequence that is alone and reads nothing."

    lately_s: Floats
    "What `joined_s` was of late."


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """How the real pace scatters around the predicted one, in logs."""

    bias: float = 0.0
    sigma: float = COLD_SIGMA

    def odds(self, promised_s: Floats | float, pace_s: Floats) -> Floats:
        """The chance that a promise per token is kept at this predicted pace.

        >>> Noise().odds(0.05, np.array([0.025, 0.05, 0.1])).round(2)
        array([1. , 0.5, 0. ])
        """
        z: Floats = promised_s / pace_s
        np.log(z, out=z)
        z -= self.bias
        z /= self.sigma
        np.minimum(np.maximum(z, Z_MIN, out=z), Z_MAX, out=z)
        np.exp(np.multiply(z, STEEPNESS, out=z), out=z)
        z += WHOLE
        np.divide(WHOLE, z, out=z)
        return z

    def fall(self, odds: Floats, slower: Floats) -> Floats:
        """By how much such a chance falls when everything there becomes slower by this part."""
        fall: Floats = LOGISTIC / self.sigma * odds * (WHOLE - odds) * slower
        return np.minimum(odds, fall)


class Pace:
    """What decoding takes on every endpoint."""

    def __init__(self) -> None:
        """Untaught: as declared."""
        self._regression = DecayedRegression(np.ones(TERMS))
        self._rated: Floats = np.zeros((3, 0))
        self.speeds = Speeds()
        self._prefill_s: Floats = np.zeros(0)
        self._prefill_at = -math.inf
        self._lately_s: Floats = np.zeros(0)
        "NaN where nobody has asked yet."
        self._lately_at = -math.inf
        self._errors = Window(SPREAD_SIZE)

    def open(self, slot: int, hardware: Hardware) -> None:
        """An endpoint takes this slot, as declared."""
        self.speeds.open(slot)
        if slot == len(self._prefill_s):
            self._rated = np.column_stack([self._rated, np.zeros(3)])
            self._prefill_s = np.append(self._prefill_s, 0.0)
            self._lately_s = np.append(self._lately_s, math.nan)
        self._rated[:, slot] = hardware.step_s, hardware.sequence_s, hardware.kv_s
        self._prefill_s[slot] = 0.0
        self._lately_s[slot] = math.nan

    def export(self) -> Sums:
        """What the whole fleet has taught; `errors` are apart."""
        return self._regression.export()

    def restore(self, sums: Sums, errors: Iterable[float]) -> None:
        """Take that over; the sums must be sound, the errors finite."""
        self._regression.restore(sums)
        self._errors = Window(SPREAD_SIZE, errors)

    @property
    def errors(self) -> tuple[float, ...]:
        """The latest log errors, oldest first."""
        return tuple(self._errors)

    def prefill(self, slot: int, work_s: float, now: float) -> None:
        """So many seconds of prefill go there now."""
        if now > self._prefill_at:
            self._prefill_s *= math.exp(min(0.0, (self._prefill_at - now) / PREFILL_S))
            self._prefill_at = now
        self._prefill_s[slot] += work_s

    def load(self, batch: Floats, read: Floats, now: float) -> Load:
        """What decoding costs now, given how many sequences there are and the KV tokens they read."""
        step_s, sequence_s, kv_s = self._rated
        weights, speed = self._regression.weights, np.exp(self.speeds.log)
        stretch = weights[3] * self._stretch(now)
        one_s = speed * sequence_s * (weights[1] + stretch)
        token_s = speed * kv_s * (weights[2] + stretch)
        base_s = speed * step_s
        joined_s = base_s * (weights[0] + stretch) + one_s * (batch + 1) + token_s * read
        return Load(
            joined_s=joined_s,
            sequence_s=one_s,
            token_s=token_s,
            alone_s=base_s * weights[0] + speed * sequence_s * weights[1],
            lately_s=self._late(joined_s, now),
        )

    def row(self, slot: int, batch: float, read: float, now: float) -> tuple[float, ...]:
        """The terms of one endpoint at this moment."""
        step_s, sequence_s, kv_s = self._rated[:, slot].tolist()
        parts = step_s, sequence_s * batch, kv_s * read
        prefill_s = self._prefill_s.item(slot) * self._faded(now)
        share = min(SHARE_MAX, prefill_s / PREFILL_S)
        return (*parts, sum(parts) * share / (1.0 - share))

    def learn(self, slot: int, row: Sequence[float], seconds: float) -> None:
        """One answer had this many seconds per token, in a load of which `row` says the terms."""
        if not 1e-4 <= seconds <= 10.0:
            return
        speed = math.exp(self.speeds.log[slot])
        expected_s = speed * sum(map(mul, row, self._regression.weights))
        log_error = math.log(seconds / max(1e-6, expected_s))
        self._errors.add(log_error)
        weight = regression.trust(log_error) * (speed / seconds) ** 2
        self._regression.learn_row(row, seconds / speed, weight)
        self.speeds.learn(slot, log_error)

    def noise(self) -> Noise:
        """How far off predictions were of late."""
        errors = self._errors
        if len(errors) < SPREAD_LEAST:
            return Noise()
        sigma = 0.5 * (errors.quantile(0.84) - errors.quantile(0.16))
        return Noise(bias=errors.quantile(0.5), sigma=max(SIGMA_MIN, sigma))

    def _late(self, pace_s: Floats, now: float) -> Floats:
        """The pace of late, this one included."""
        kept = math.exp(min(0.0, (self._lately_at - now) / LATELY_S))
        lately_s = self._lately_s = pace_s + kept * (self._lately_s - pace_s)
        self._lately_at = max(now, self._lately_at)
        unknown = np.isnan(lately_s)
        lately_s[unknown] = pace_s[unknown]
        return lately_s

    def _stretch(self, now: float) -> Floats:
        """Seconds of prefill for each second of decoding."""
        share = np.minimum(SHARE_MAX, self._prefill_s * (self._faded(now) / PREFILL_S))
        stretch: Floats = share / (1.0 - share)
        return stretch

    def _faded(self, now: float) -> float:
        """What is left by now of the prefill that was counted up to the last."""
        return math.exp(min(0.0, (self._prefill_at - now) / PREFILL_S))
