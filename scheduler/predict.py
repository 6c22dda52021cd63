"""What a request will really cost, learned one completion at a time.

    seconds to first token = speed[endpoint] * (weights . features)

The features are the physics of `cost` in seconds, so untaught weights are one. A Bayesian linear regression shared
by the fleet learns the weights and forgets towards that prior (`regression`); one log-speed an endpoint learns how
that server differs, and learns fast after a drift (`speed`). Both are linear in the tokens, which is why a plan can
add up what stands in line. How far off all this is, is learned too (`spread`).
"""

import math
from collections.abc import Sequence
from operator import mul

import msgspec
import numpy as np

from scheduler import cost
from scheduler.guard import Guard
from scheduler.ledger import Rates
from scheduler.lengths import Lengths
from scheduler.pace import Pace
from scheduler.regression import DecayedRegression
from scheduler.speed import LOG_MAX, Speed
from scheduler.spread import Spread
from scheduler.state import Floats
from scheduler.transfer import Transfer
from scheduler.wire import Beat, Reward

N = len(cost.FEATURES)

START = "start"
"Beside the features a job carries the predicted wait, which says how uncertain the prediction was."

_PREFIXES = tuple(f"{name}=" for name in (*cost.FEATURES, START))

SECONDS_MAX = 3600.0
"No first token takes an hour: what says so is no measurement."

RELATIVE_FLOOR_S = 0.02
"Errors are relative to the seconds predicted, and to this where they are fewer."

RATE_FLOOR = 0.02
"Nor does any learned rate fall below this part of the declared one: a plan must not believe in free work."

REMEMBERED_MAX = 1000
"Endpoints that left and whose speed is kept for their next life."


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned, as plain numbers; the only part that a new leader takes over."""

    version: int = 1
    "Of this layout; another one is a cold start."

    precision: tuple[float, ...] = ()
    "The regression's precision matrix, row by row."

    moment: tuple[float, ...] = ()
    "Its precision times its mean."

    endpoints: dict[str, tuple[float, ...]] = {}
    "By endpoint: log speed, completions, error, coverage."

    hardware: dict[str, str] = {}
    "By endpoint: what it had declared when that was learned."

    windows: dict[str, tuple[float, ...]] = {}
    "Recent values of every running quantile, oldest first."

    models: tuple[str, ...] = ()
    "Every model ever served here."


class Predictor:
    """Rates of every endpoint, medians of every model, and how far either can be trusted."""

    def __init__(self) -> None:
        """Untaught: the declared hardware's own rates."""
        self._regression = DecayedRegression(np.ones(N))
        self._speeds: list[Speed | None] = []
        self._prior: Floats = np.zeros((4, 0))
        self._log_speed: Floats = np.zeros(0)
        self._spread = Spread()
        self.lengths = Lengths()
        self.pace = Pace()
        self.guard = Guard()
        self.transfer = Transfer()
        self._remembered: dict[str, tuple[str, tuple[float, ...]]] = {}

    def open(self, slot: int, beat: Beat) -> None:
        """An endpoint takes this slot. What was learned of its name holds while its hardware is the same."""
        if slot == len(self._speeds):
            self._speeds.append(None)
            self._prior = np.column_stack([self._prior, np.zeros(4)])
            self._log_speed = np.append(self._log_speed, 0.0)
        rates = cost.hardware(beat.hardware)
        speed = Speed(name=beat.endpoint, declared=beat.hardware, hardware=rates)
        declared, numbers = self._remembered.pop(beat.endpoint, ("", ()))
        if numbers and declared == beat.hardware:
            speed.recall(numbers)
        self._speeds[slot] = speed
        self._log_speed[slot] = speed.log
        self.pace.open(slot, rates)
        self.guard.open(slot)
        self.transfer.open(slot, beat)
        self._prior[:, slot] = rates.overhead_s, rates.token_s, rates.attention_s, rates.kv_s

    def close(self, slot: int) -> None:
        """Its endpoint is gone; its speed is remembered by name, for its next life."""
        speed = self._at(slot)
        self._remembered[speed.name] = speed.declared, speed.numbers
        if len(self._remembered) > REMEMBERED_MAX:
            del self._remembered[next(iter(self._remembered))]
        self._speeds[slot] = None

    def rates(self, decode_kv: Floats) -> Rates:
        """What prefilling costs on every slot now, given what decodes there."""
        overhead_s, token_s, pair_s, kv_s = self._prior
        weights, speed = self._regression.weights, np.exp(self._log_speed)
        decode_s = kv_s * decode_kv
        per_token_s = weights[1] * token_s + weights[4] * decode_s / cost.CHUNK_TOKENS
        rates = Rates(
            overhead_s=speed * (weights[0] * overhead_s + weights[3] * decode_s),
            token_s=np.maximum(speed * per_token_s, RATE_FLOOR * token_s),
            pair_s=speed * weights[2] * pair_s,
        )
        return self._guarded(rates, decode_s) if self.guard.is_on else rates

    def predict(self, features: Floats) -> Floats:
        """Seconds to first token: float64[n_slots, n_features] in, float64[n_slots] out."""
        seconds: Floats = np.exp(self._log_speed) * (features @ self._regression.weights)
        return np.clip(seconds, 1e-3, SECONDS_MAX)

    def features(
        self, slot: int, *, tokens: float, pairs: float, decode_kv: float, start_s: float
    ) -> tuple[str, ...]:
        """What is seen at this decision, as it rides in the job and comes back in the reward."""
        values = cost.features(
            hardware=self._at(slot).hardware, tokens=tokens, pairs=pairs, decode_kv=decode_kv
        )
        named = zip(_PREFIXES, (*values, start_s), strict=True)
        return tuple([f"{prefix}{value:.6g}" for prefix, value in named])

    def odds(self, start_s: float, log_ratio: float) -> float:
        """The part of completions behind so many predicted seconds whose log(actual / predicted) is no more."""
        return self._spread.odds(start_s, log_ratio)

    def learn(self, reward: Reward, slot: int) -> None:
        """Learn from one attempt; whatever is no measurement teaches nothing."""
        self.lengths.learn(reward)
        if reward.leg == "decode":
            self.transfer.learn(reward, slot)
            return
        row = _parsed(reward.features)
        seconds = measured_s(reward)
        if row is None or seconds is None:
            return
        *x, start_s = row
        speed = self._at(slot)
        own_speed = math.exp(speed.log)
        predicted_s = self._bounded(own_speed, x)
        log_error = math.log(seconds / predicted_s)
        # What plans are made with, which is what was learned unless something went wrong between.
        planned = log_error - (float(self._log_speed[slot]) - speed.log)
        self.guard.judge(slot, learned=planned, prior=math.log(seconds / max(1e-3, sum(x))))
        self._judge(speed, reward, start_s, seconds, predicted_s)
        scale_s = max(RELATIVE_FLOOR_S, 0.5 * (predicted_s + seconds) / own_speed)
        weight = min(1.0, 1.0 / max(1e-9, abs(log_error))) / scale_s**2
        self._regression.learn_row(x, seconds / own_speed, weight)
        speed.learn(log_error)
        self._log_speed[slot] = speed.log

    def predict_one(self, x: Sequence[float], slot: int) -> float:
        """Seconds to first token for one row of features on one slot."""
        return self._bounded(self.speed(slot), x)

    def speed(self, slot: int) -> float:
        """How many times the declared time it takes."""
        return math.exp(self._at(slot).log)

    def error(self, slot: int) -> float:
        """Moving mean of |log(actual / predicted)|."""
        return self._at(slot).error

    def coverage(self, slot: int) -> float:
        """Moving share of completions within the 90 % bound."""
        return self._at(slot).coverage

    def export(self, models: tuple[str, ...]) -> Learned:
        """All that was learned, as plain numbers."""
        known = {s.name: (s.declared, s.numbers) for s in self._speeds if s is not None}
        known = {**self._remembered, **known}
        return Learned(
            precision=tuple(self._regression.precision.ravel().tolist()),
            moment=tuple(self._regression.moment.tolist()),
            endpoints={name: numbers for name, (_, numbers) in known.items()},
            hardware={name: declared for name, (declared, _) in known.items()},
            windows={**self._spread.export(), **self.lengths.export()},
            models=models,
        )

    def restore(self, learned: Learned) -> bool:
        """Take over what was learned elsewhere, before any endpoint is here; False and untouched if unusable."""
        if not _is_sound(learned):
            return False
        precision = np.array(learned.precision).reshape(N, N)
        self._regression.recall(precision, np.array(learned.moment))
        self._remembered = {
            name: (learned.hardware.get(name, ""), numbers)
            for name, numbers in learned.endpoints.items()
        }
        self._spread.restore(learned.windows)
        self.lengths.restore(learned.windows)
        for slot, speed in enumerate(self._speeds):
            if speed is not None and speed.count == 0:
                beat = Beat(endpoint=speed.name, epoch=0, hardware=speed.declared)
                self.open(slot, beat)
        return True

    def _judge(
        self, speed: Speed, reward: Reward, start_s: float, seconds: float, predicted_s: float
    ) -> None:
        """Against what was predicted *then*, where the reward still says it: honest with late feedback."""
        then_s = reward.predicted_s
        if then_s is not None and 1e-3 <= then_s <= SECONDS_MAX:
            predicted_s = then_s
        log_ratio = math.log(seconds / predicted_s)
        bound = self._spread.log_ratio(start_s, 0.9)
        speed.judge(log_ratio, is_covered=log_ratio <= bound)
        self._spread.add(start_s, log_ratio)

    def _guarded(self, rates: Rates, decode_s: Floats) -> Rates:
        """The same, but as declared where what was learned is not to be believed."""
        overhead_s, token_s, pair_s, _ = self._prior
        distrusted = self.guard.distrusted
        return Rates(
            overhead_s=np.where(distrusted, overhead_s + decode_s, rates.overhead_s),
            token_s=np.where(distrusted, token_s + decode_s / cost.CHUNK_TOKENS, rates.token_s),
            pair_s=np.where(distrusted, pair_s, rates.pair_s),
        )

    def _bounded(self, speed: float, x: Sequence[float]) -> float:
        # Python's floats: for five of them numpy's calls would cost three times as much.
        seconds: float = speed * sum(map(mul, x, self._regression.weights))
        return min(SECONDS_MAX, max(1e-3, seconds))

    def _at(self, slot: int) -> Speed:
        speed = self._speeds[slot]
        assert speed is not None, f"slot {slot} has no endpoint"
        return speed


def measured_s(reward: Reward) -> float | None:
    """Seconds to first token as the worker's own clock saw them; None where it did not.

    From the pull where it is known, so that what the worker held back before admission counts as the queue that
    the features at decision time had already seen; else from admission.
    """
    seconds = reward.prefill_s
    if reward.pulled_at is not None and reward.first_token_at is not None:
        seconds = reward.first_token_at - reward.pulled_at
    if seconds is None or not 1e-4 <= seconds <= SECONDS_MAX:
        return None
    return seconds


def _parsed(features: Sequence[str]) -> list[float] | None:
    """The features as a row, and last the wait; None unless all are there as they were sent, each a sane number."""
    named = zip(features, _PREFIXES, strict=True)
    try:
        row = [float(feature.removeprefix(prefix)) for feature, prefix in named]
    except ValueError:  # one is missing, or still has another's name
        return None
    return row if all(0 <= value <= SECONDS_MAX for value in row) else None  # nan fails it too


def _is_sound(learned: Learned) -> bool:
    """Whether these numbers are of this layout, finite, and a precision that can be solved."""
    flat = [*learned.precision, *learned.moment]
    flat += [
        n for numbers in (*learned.endpoints.values(), *learned.windows.values()) for n in numbers
    ]
    if learned.version != 1 or not all(math.isfinite(number) for number in flat):
        return False
    if len(learned.precision) != N * N or len(learned.moment) != N:
        return False
    if any(len(n) != 4 or abs(n[0]) > LOG_MAX or n[1] < 0 for n in learned.endpoints.values()):
        return False
    precision = np.array(learned.precision).reshape(N, N)
    return bool(np.allclose(precision, precision.T) and np.linalg.eigvalsh(precision).min() > 1e-6)
