"""What River gives us, and the only file that knows it: a Bayesian regression, and a detector of drift."""

import numpy as np
from river import drift, linear_model

from scheduler.state import Floats

SOLVE_ALL, SOLVE_EVERY = 64, 8
"""After each of the first lessons the weights are solved anew, then after one in so many.

A solution costs as much as all the rest of a lesson; eight lessons of 1 / (1 - decay) = 100 move little, and what
one endpoint does differently is its `Speed`, which is never late.
"""


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
        self._lessons = 0

    def learn_row(self, x: Floats, y: float, weight: float) -> None:
        """One completion: float64[n] features, and the seconds it took."""
        rest = 1.0 - self.decay
        self.precision *= self.decay
        self.precision += (weight * x)[:, None] * x
        self.precision.flat[:: len(x) + 1] += rest * self.prior_precision
        self.moment *= self.decay
        self.moment += rest * self.prior_precision * self.prior_mean + (weight * y) * x
        self._lessons += 1
        if self._lessons <= SOLVE_ALL or self._lessons % SOLVE_EVERY == 0:
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

    def recall(self, precision: Floats, moment: Floats) -> None:
        """Take over what was learned elsewhere."""
        self.precision, self.moment = precision, moment
        self.weights = self.solve()


class Drift:
    """Page and Hinkley's test on log errors: says when their mean has moved."""

    def __init__(self) -> None:
        """Expect nothing yet."""
        self._test = _test()

    def is_seen(self, log_error: float) -> bool:
        """Whether this one was the last straw; the test then begins anew."""
        self._test.update(max(-1.5, min(1.5, log_error)))  # type: ignore[no-untyped-call]
        if self._test.drift_detected:
            self._test = _test()
            return True
        return False


def _test() -> drift.PageHinkley:
    return drift.PageHinkley(min_instances=8, delta=0.1, threshold=2.5, alpha=0.999)
