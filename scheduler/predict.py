"""What a request will really cost, learned one completion at a time.

    seconds to first token = speed[endpoint] * (weights . features)

The features are the physics of `cost` in seconds, so untaught weights are one. A Bayesian linear regression shared
by the fleet learns the weights and forgets towards that prior; one log-speed an endpoint learns how that server
differs, and learns fast after Page-Hinkley has seen it change. Both are linear in the tokens, which is why a plan
can add up what stands in line. The only file that knows River.
"""

import math

import msgspec
import numpy as np
from river import drift, linear_model

from scheduler import cost
from scheduler.cost import Hardware
from scheduler.ledger import Rates
from scheduler.state import Floats
from scheduler.window import Window
from scheduler.wire import Beat, Reward

N = len(cost.FEATURES)

START = "start"
"Beside the features a job carries the predicted wait, which says how uncertain the prediction was."

SECONDS_MAX = 3600.0
"No first token takes an hour: what says so is no measurement."

RELATIVE_FLOOR_S = 0.02
"Errors are relative to the seconds predicted, and to this where they are fewer."

GAIN, FAST_GAIN, FAST_TURNS = 0.03, 0.3, 15
"How much of a log error an endpoint's speed takes over: always, and for this many completions after a drift."

SPEED_STEP = 0.7
"The largest log error believed at once, a factor of two."

LOG_SPEED_MAX = 3.0
"A server is at most 20 times faster or slower than declared."

RATE_FLOOR = 0.02
"Nor does any learned rate fall below this part of the declared one: a plan must not believe in free work."

BUCKETS_S = (1e-3, 0.2)
"Predictions are as uncertain as what stands before them: nothing, a little, more."

SPREAD_WINDOW, SPREAD_MIN = 300, 30
"Completions a bucket remembers, and how many make its quantiles worth believing."

COLD_SIGMA = 0.3
"Until then: the log error of a data sheet's prediction, roughly a normal one."

ANSWER_TOKENS, ANSWER_TOKEN_S, PROMPT_TOKENS = 256, 0.03, 1024
"What is usual of a model before any answer was seen."

LENGTHS_WINDOW = 100
"Completions a model's running medians are taken over; on real traces that beats a learned length."

MODELS_MAX = 64
"Models whose medians are kept."


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


class DecayedRegression(linear_model.BayesianLinearRegression):
    """River's Bayesian regression with forgetting that keeps its prior, and weights that are never negative.

    River's own `smoothing` forgets the prior as well: one feature that stays zero then ends in NaN. Here
    precision <- decay * precision + (1 - decay) * prior + weight * x x'. Rows instead of dicts.
    """

    def __init__(
        self, prior_mean: Floats, prior_precision: float = 0.1, decay: float = 0.99
    ) -> None:
        """Believe the prior as much as `prior_precision` of one completion; remember 1 / (1 - decay) of them."""
        super().__init__(alpha=1.0, beta=1.0, smoothing=None)
        self.prior_mean = prior_mean
        self.prior_precision = prior_precision
        self.decay = decay
        self.precision: Floats = np.eye(len(prior_mean)) * prior_precision
        self.moment: Floats = prior_mean * prior_precision
        self.weights: Floats = prior_mean.copy()

    def learn_row(self, x: Floats, y: float, weight: float) -> None:
        """One completion: float64[n] features, and the seconds it took."""
        rest = 1.0 - self.decay
        self.precision *= self.decay
        self.precision += (weight * x)[:, None] * x
        self.precision.flat[:: len(x) + 1] += rest * self.prior_precision
        self.moment *= self.decay
        self.moment += rest * self.prior_precision * self.prior_mean + (weight * y) * x
        self.weights = self.solve()

    def solve(self) -> Floats:
        """The most likely weights that are not negative: the most negative one is dropped until none is."""
        kept = np.arange(len(self.moment))
        weights = np.linalg.solve(self.precision, self.moment)
        while len(kept) > 1 and weights.min() < 0:
            kept = np.delete(kept, int(weights[kept].argmin()))
            weights = np.zeros(len(self.moment))
            weights[kept] = np.linalg.solve(self.precision[np.ix_(kept, kept)], self.moment[kept])
        clipped: Floats = np.maximum(weights, 0.0)
        return clipped


class Speed(msgspec.Struct, kw_only=True):
    """How one endpoint differs from what it declares."""

    name: str
    declared: str
    hardware: Hardware
    log: float = 0.0
    "Log of the times longer it takes."
    count: int = 0
    "Completions learned from."
    error: float = 0.0
    "Moving mean of |log(actual / predicted)|."
    coverage: float = 0.0
    "Moving share of those within the 90 % bound."
    fast: int = 0
    "Completions for which it still learns fast."
    detector: drift.PageHinkley

    def learn(self, log_error: float) -> None:
        """Take over a part of one log error; more of it while young, and after a drift."""
        self.detector.update(max(-1.5, min(1.5, log_error)))  # type: ignore[no-untyped-call]
        if self.detector.drift_detected:
            self.fast, self.detector = FAST_TURNS, _detector()
        gain = max(GAIN, 1 / (self.count + 3), FAST_GAIN if self.fast else 0.0)
        self.fast = max(0, self.fast - 1)
        self.count += 1
        moved = self.log + gain * max(-SPEED_STEP, min(SPEED_STEP, log_error))
        self.log = max(-LOG_SPEED_MAX, min(LOG_SPEED_MAX, moved))

    def judge(self, log_ratio: float, *, is_covered: bool) -> None:
        """Keep account of how good its predictions were."""
        gain = max(0.05, 1 / (self.count + 1))
        self.error += gain * (abs(log_ratio) - self.error)
        self.coverage += gain * (float(is_covered) - self.coverage)


class Predictor:
    """Rates of every endpoint, medians of every model, and how far either can be trusted."""

    def __init__(self) -> None:
        """Untaught: the declared hardware's own rates."""
        self._regression = DecayedRegression(np.ones(N))
        self._speeds: list[Speed | None] = []
        self._prior: Floats = np.zeros((4, 0))
        self._log_speed: Floats = np.zeros(0)
        self._spreads = [Window(SPREAD_WINDOW) for _ in range(len(BUCKETS_S) + 1)]
        self._medians: dict[str, Window] = {}
        self._remembered: dict[str, tuple[str, tuple[float, ...]]] = {}

    def open(self, slot: int, beat: Beat) -> None:
        """An endpoint takes this slot. What was learned of its name holds while its hardware is the same."""
        if slot == len(self._speeds):
            self._speeds.append(None)
            self._prior = np.column_stack([self._prior, np.zeros(4)])
            self._log_speed = np.append(self._log_speed, 0.0)
        rates = cost.hardware(beat.hardware)
        speed = Speed(
            name=beat.endpoint, declared=beat.hardware, hardware=rates, detector=_detector()
        )
        declared, numbers = self._remembered.pop(beat.endpoint, ("", ()))
        if numbers and declared == beat.hardware:
            speed.log, count, speed.error, speed.coverage = numbers
            speed.count = min(
                int(count), FAST_TURNS
            )  # a new life may differ: learn a little faster
        self._speeds[slot] = speed
        self._log_speed[slot] = speed.log
        self._prior[:, slot] = rates.overhead_s, rates.token_s, rates.attention_s, rates.kv_s

    def close(self, slot: int) -> None:
        """Its endpoint is gone; its speed is remembered by name, for its next life."""
        speed = self._at(slot)
        self._remembered[speed.name] = speed.declared, _numbers(speed)
        if len(self._remembered) > 1000:
            del self._remembered[next(iter(self._remembered))]
        self._speeds[slot] = None

    def rates(self, decode_kv: Floats) -> Rates:
        """What prefilling costs on every slot now, given what decodes there."""
        overhead_s, token_s, pair_s, kv_s = self._prior
        weights, speed = self._regression.weights, np.exp(self._log_speed)
        decode_s = kv_s * decode_kv
        per_token_s = weights[1] * token_s + weights[4] * decode_s / cost.CHUNK_TOKENS
        return Rates(
            overhead_s=speed * (weights[0] * overhead_s + weights[3] * decode_s),
            token_s=np.maximum(speed * per_token_s, RATE_FLOOR * token_s),
            pair_s=speed * weights[2] * pair_s,
        )

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
        names = (*cost.FEATURES, START)
        return tuple(f"{n}={v:.6g}" for n, v in zip(names, (*values, start_s), strict=True))

    def spread(self, backlog_s: Floats, part: float) -> Floats:
        """By what factor this part of the completions beat its prediction; 1 where `part` is 0."""
        if part <= 0:
            return np.ones(len(backlog_s))
        logs = np.array([self._log_ratio(bucket, part) for bucket in range(len(self._spreads))])
        chosen: Floats = np.exp(logs)[np.searchsorted(BUCKETS_S, backlog_s)]
        return chosen

    def learn(self, reward: Reward, slot: int) -> None:
        """Learn from one attempt; whatever is no measurement teaches nothing."""
        self._learn_lengths(reward)
        values = _parsed(reward.features)
        seconds = measured_s(reward)
        if values is None or seconds is None:
            return
        x, start_s = values
        speed = self._at(slot)
        predicted_s = float(self.predict_one(x, slot))
        log_error = math.log(seconds / predicted_s)
        self._judge(speed, reward, start_s, seconds, predicted_s)
        own_speed = math.exp(speed.log)
        scale_s = max(RELATIVE_FLOOR_S, 0.5 * (predicted_s + seconds) / own_speed)
        weight = min(1.0, 1.0 / max(1e-9, abs(log_error))) / scale_s**2
        self._regression.learn_row(x, seconds / own_speed, weight)
        speed.learn(log_error)
        self._log_speed[slot] = speed.log

    def predict_one(self, x: Floats, slot: int) -> float:
        """Seconds to first token for one row of features on one slot."""
        seconds = math.exp(self._at(slot).log) * float(x @ self._regression.weights)
        return min(SECONDS_MAX, max(1e-3, seconds))

    def usual_answer(self, model: str) -> tuple[int, float]:
        """How many tokens this model's answers usually have, and how many seconds each takes."""
        tokens = self._median(f"answer:{model}", ANSWER_TOKENS)
        return int(tokens), self._median(f"token_s:{model}", ANSWER_TOKEN_S)

    def usual_prompt(self, model: str) -> int:
        """How long this model's prompts usually are, for those that nobody measured."""
        return int(self._median(f"prompt:{model}", PROMPT_TOKENS))

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
        known = {s.name: (s.declared, _numbers(s)) for s in self._speeds if s is not None}
        known = {**self._remembered, **known}
        windows = {f"spread:{i}": tuple(w) for i, w in enumerate(self._spreads)}
        windows.update((name, tuple(window)) for name, window in self._medians.items())
        return Learned(
            precision=tuple(self._regression.precision.ravel().tolist()),
            moment=tuple(self._regression.moment.tolist()),
            endpoints={name: numbers for name, (_, numbers) in known.items()},
            hardware={name: declared for name, (declared, _) in known.items()},
            windows=windows,
            models=models,
        )

    def restore(self, learned: Learned) -> bool:
        """Take over what was learned elsewhere, before any endpoint is here; False and untouched if unusable."""
        if not _is_sound(learned):
            return False
        self._regression.precision = np.array(learned.precision).reshape(N, N)
        self._regression.moment = np.array(learned.moment)
        self._regression.weights = self._regression.solve()
        self._remembered = {
            name: (learned.hardware.get(name, ""), numbers)
            for name, numbers in learned.endpoints.items()
        }
        for name, values in learned.windows.items():
            self._restore_window(name, values)
        for slot, speed in enumerate(self._speeds):
            if speed is not None and speed.count == 0:
                beat = Beat(endpoint=speed.name, epoch=0, hardware=speed.declared)
                self.open(slot, beat)
        return True

    def _restore_window(self, name: str, values: tuple[float, ...]) -> None:
        for bucket in range(len(self._spreads)):
            if name == f"spread:{bucket}":
                self._spreads[bucket] = Window(SPREAD_WINDOW, values)
                return
        self._medians[name] = Window(LENGTHS_WINDOW, values)

    def _judge(
        self, speed: Speed, reward: Reward, start_s: float, seconds: float, predicted_s: float
    ) -> None:
        """Against what was predicted *then*, where the reward still says it: honest with late feedback."""
        then_s = reward.predicted_s
        if then_s is not None and 1e-3 <= then_s <= SECONDS_MAX:
            predicted_s = then_s
        bucket = int(np.searchsorted(BUCKETS_S, start_s))
        log_ratio = math.log(seconds / predicted_s)
        speed.judge(log_ratio, is_covered=log_ratio <= self._log_ratio(bucket, 0.9))
        self._spreads[bucket].add(log_ratio)

    def _log_ratio(self, bucket: int, part: float) -> float:
        """The quantile of log(actual / predicted), from what was seen, else a normal guess."""
        seen = self._spreads[bucket]
        if len(seen) >= SPREAD_MIN:
            return seen.quantile(part)
        # The logistic curve's quantile: within 4 % of the normal one from 2 % to 98 %.
        return COLD_SIGMA * math.log(part / (1.0 - part)) / 1.702 if part < 1 else math.inf

    def _learn_lengths(self, reward: Reward) -> None:
        if reward.outcome != "completed":
            return
        self._add(f"answer:{reward.model}", reward.output_tokens)
        self._add(f"prompt:{reward.model}", reward.prompt_tokens)
        self._add(f"token_s:{reward.model}", reward.tpot_s or 0.0)

    def _add(self, name: str, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            return
        if name not in self._medians:
            if len(self._medians) >= 3 * MODELS_MAX:
                del self._medians[next(iter(self._medians))]
            self._medians[name] = Window(LENGTHS_WINDOW)
        self._medians[name].add(value)

    def _median(self, name: str, unseen: float) -> float:
        seen = self._medians.get(name)
        return unseen if seen is None or not len(seen) else seen.quantile(0.5)

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


def _parsed(features: tuple[str, ...]) -> tuple[Floats, float] | None:
    """The features as a row, and the wait; None unless every one is there and a sane number."""
    values: dict[str, float] = {}
    for feature in features[: 2 * N]:
        name, _, text = feature.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            return None
    row = [values.get(name, math.nan) for name in (*cost.FEATURES, START)]
    if not all(0 <= value <= SECONDS_MAX for value in row):  # nan fails it too
        return None
    return np.array(row[:-1]), row[-1]


def _numbers(speed: Speed) -> tuple[float, ...]:
    return speed.log, float(speed.count), speed.error, speed.coverage


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
    if any(
        len(n) != 4 or abs(n[0]) > LOG_SPEED_MAX or n[1] < 0 for n in learned.endpoints.values()
    ):
        return False
    precision = np.array(learned.precision).reshape(N, N)
    return bool(np.allclose(precision, precision.T) and np.linalg.eigvalsh(precision).min() > 1e-6)


def _detector() -> drift.PageHinkley:
    return drift.PageHinkley(min_instances=8, delta=0.1, threshold=2.5, alpha=0.999)
