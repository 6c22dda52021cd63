"""Lodestar: one small network that learns time to first token in rounds, and is followed greedily.

Our equivalent of the published router: a two-layer perceptron over request and endpoint features, trained at the
end of each round on what the last rounds brought, reward -TTFT. Until the first round is over it spreads requests
by least requests. Features are standardised by the training set's own mean and spread.
"""

from collections import deque

import numpy as np

from scheduler.sim.baselines.load import least
from scheduler.sim.baselines.senses import Account, Asked, Prefixes, Scrapes
from scheduler.state import Floats
from scheduler.wire.worker import Reward

FEATURES = 9
HIDDEN = 32
STEPS = 480
"Batches a round learns from, however few answers there are yet: with fewer the first networks route by chance."

BATCH = 64
STEP = 0.005
"Adam's."

SPREAD_MIN = 0.1
"""
The least spread that a feature is divided by; all are made to be about 1 when an endpoint is busy.

Nothing waits anywhere while a fleet is young, so that feature's own spread is 0. Divided by next to nothing, the first
line of waiting requests drove every unit into saturation, and all requests to one endpoint until the round was over:
mean times to first token of 0.2 to 15 s from seed to seed, where now they are 0.20 to 0.23 (A1, load 0.5).
"""

KEPT = 4000
"Answers that a round learns from."


class Perceptron:
    """FEATURES -> HIDDEN (tanh) -> 1, trained by Adam on squared error."""

    def __init__(self, rng: np.random.Generator, n_inputs: int, *, mean: float = 0.0) -> None:
        """Random weights; `mean` is what it predicts on average before it has learned."""
        self._weights: list[Floats] = [
            rng.normal(0.0, n_inputs**-0.5, (n_inputs, HIDDEN)),
            np.zeros(HIDDEN),
            rng.normal(0.0, HIDDEN**-0.5, HIDDEN),
            np.full(1, mean),
        ]
        self._mean = [np.zeros_like(w) for w in self._weights]
        self._square = [np.zeros_like(w) for w in self._weights]
        self._n_steps = 0

    def predict(self, inputs: Floats) -> Floats:
        """float64[n] from float64[n, n_inputs]."""
        into, bias, out, last = self._weights
        found: Floats = np.tanh(inputs @ into + bias) @ out + last[0]
        return found

    def learn(self, inputs: Floats, targets: Floats) -> None:
        """One step down the gradient of a batch."""
        into, bias, out, last = self._weights
        hidden = np.tanh(inputs @ into + bias)
        error = (hidden @ out + last[0] - targets) / len(targets)
        back = np.outer(error, out) * (1.0 - hidden**2)
        gradients = [inputs.T @ back, back.sum(axis=0), hidden.T @ error, np.array([error.sum()])]
        self._n_steps += 1
        grown = 1.0 - 0.999**self._n_steps
        for at, gradient in enumerate(gradients):
            self._mean[at] = 0.9 * self._mean[at] + 0.1 * gradient
            self._square[at] = 0.999 * self._square[at] + 0.001 * gradient**2
            momentum = self._mean[at] / (1.0 - 0.9**self._n_steps)
            self._weights[at] -= STEP * momentum / (np.sqrt(self._square[at] / grown) + 1e-8)


class Lodestar:
    """Predicts -reward for each slot and takes the best."""

    def __init__(
        self,
        account: Account,
        scrapes: Scrapes,
        prefixes: Prefixes,
        *,
        round_s: float,
        least_answers: int,
        rng: np.random.Generator,
    ) -> None:
        self._account, self._scrapes, self._prefixes = account, scrapes, prefixes
        self._round_s, self._least_answers, self._rng = round_s, least_answers, rng
        self._seen: dict[str, Floats] = {}
        self._answers: deque[tuple[Floats, float]] = deque(maxlen=KEPT)
        self._network: Perceptron | None = None
        self._shift: Floats = np.zeros(1)
        self._scale: Floats = np.ones(1)
        self._round_ends_at = round_s

    def choose(self, asked: Asked, slots: list[int], now: float) -> int:  # noqa: ARG002
        features = self._features(asked)
        if self._network is None or features.shape[1] != len(self._shift):
            slot = least(self._account.requests(), slots, self._rng)
        else:
            expected = self._network.predict((features - self._shift) / self._scale)
            slot = min(slots, key=lambda at: (float(expected[at]), at))
        self._seen[asked.id] = features[slot]
        return slot

    def learn(self, reward: Reward, now: float) -> None:
        """Keep an answer; at the end of a round learn from all that are kept."""
        features = self._seen.pop(reward.id, None)
        if features is not None and reward.ttft_s is not None:
            # Seconds span four decades; the order of slots is the same in logarithms.
            self._answers.append((features, float(np.log(max(reward.ttft_s, 1e-3)))))
        if now >= self._round_ends_at:
            self._round_ends_at = now + self._round_s
            if len(self._answers) >= self._least_answers:
                self._train()

    def _features(self, asked: Asked) -> Floats:
        """float64[n_slots, FEATURES + n_slots]: the last ones say which endpoint it is."""
        cached = np.array(self._prefixes.match(asked), dtype=np.float64)
        n_slots = len(cached)
        prompt = np.full(n_slots, float(asked.prompt_tokens))
        uncached = prompt - cached
        queued = np.array(self._account.prefill_tokens())
        columns = [
            prompt / 1e4,
            uncached / 1e4,
            cached / prompt,
            queued / 1e4,
            np.log1p(queued + uncached),
            np.array(self._account.requests()) / 16,
            np.array(self._scrapes.running(), dtype=np.float64) / 16,
            np.array(self._scrapes.waiting(), dtype=np.float64) / 16,
            np.array(self._scrapes.kv_usage()),
        ]
        assert len(columns) == FEATURES
        return np.column_stack([*columns, np.eye(n_slots)])

    def _train(self) -> None:
        width = len(self._answers[-1][0])
        kept = [(features, target) for features, target in self._answers if len(features) == width]
        inputs = np.array([features for features, _ in kept])
        targets = np.array([target for _, target in kept])
        self._shift = inputs.mean(axis=0)
        self._scale = np.maximum(inputs.std(axis=0), SPREAD_MIN)
        inputs = (inputs - self._shift) / self._scale
        # From scratch each round: the standardisation has moved.
        self._network = Perceptron(self._rng, width, mean=float(targets.mean()))
        for _ in range(STEPS):
            rows = self._rng.integers(len(targets), size=BATCH)
            self._network.learn(inputs[rows], targets[rows])
