"""What River gives us, and the only file that knows it: a Bayesian regression, and a detector of drift."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from river import drift, linear_model

from scheduler.state import Floats

SOLVE_ALL, SOLVE_EVERY = 64, 8
"""After each of the first lessons the weights are solved anew, then after one in so many.

A solution costs as much as all the rest of a lesson; eight lessons of 1 / (1 - decay) = 100 move little, and what
one endpoint does differently is its `Speed`, which is never late.
"""


RELATIVE_FLOOR_S = 0.02
"Errors are relative to the seconds that something takes, and to this where they are fewer."


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """What a regression of n features has learned, as plain numbers."""

    precision: tuple[float, ...] = ()
    "n * n, row by row."

    moment: tuple[float, ...] = ()
    "n: the precision times the mean."

    weights: tuple[float, ...] = ()
    "n, as of its last solution, which may be some lessons older."

    def is_sound(self, n: int) -> bool:
        """Whether they are those of n features, finite, and of a precision that can be solved."""
        if (len(self.precision), len(self.moment), len(self.weights)) != (n * n, n, n):
            return False
        if not all(map(math.isfinite, (*self.precision, *self.moment, *self.weights))):
            return False
        precision = np.array(self.precision).reshape(n, n)
        if min(self.weights) < 0 or not np.allclose(precision, precision.T):
            return False
        return bool(np.linalg.eigvalsh(precision).min() > 1e-6)


def trust(log_error: float) -> float:
    """What a lesson counts that is so far off, in logs: 1 up to a factor of e, then ever less (Huber)."""
    return min(1.0, 1.0 / max(1e-9, abs(log_error)))


def weight(log_error: float, scale_s: float) -> float:
    """What a lesson weighs that is so far off, where errors are relative to so many seconds."""
    return trust(log_error) / max(RELATIVE_FLOOR_S, scale_s) ** 2


class DecayedRegression(linear_model.BayesianLinearRegression):
    """River's Bayesian regression with forgetting that keeps its prior, and weights that are never negative.

    River's own `smoothing` forgets the prior as well: one feature that stays zero then ends in NaN. Here
    precision <- decay * precision + (1 - decay) * prior + weight * x x'. Rows instead of dicts.

    Lessons wait for the next solution, which is all that anybody sees of them, and are then taken in together: the
    sums are those of one lesson after the other, at an eighth of numpy's calls.
    """

    def __init__(
        self, prior_mean: Floats, prior_precision: float = 0.1, decay: float = 0.99
    ) -> None:
        """Believe the prior as much as `prior_precision` of one completion; remember 1 / (1 - decay) of them."""
        super().__init__(alpha=1.0, beta=1.0, smoothing=None)
        self._n_features = len(prior_mean)
        identity = np.eye(self._n_features)
        self._prior: Floats = prior_precision * np.column_stack([identity, prior_mean])
        self._sums = self._prior.copy()
        "float64[n, n + 1]: the precision, and beside it the moment, which is the precision times the mean."
        self._fading = decay ** np.arange(SOLVE_EVERY, -1, -1.0)
        "What is left of each of the latest lessons, oldest first, when the next has come."
        self._untaken: list[tuple[float, ...]] = []
        "Features, seconds and weight of each lesson that is not in the sums."
        self._lessons = 0
        self.weights: tuple[float, ...] = tuple(prior_mean.tolist())

    @property
    def precision(self) -> Floats:
        """float64[n, n], with all that was learned so far."""
        return self._taken_in()[:, :-1]

    @property
    def moment(self) -> Floats:
        """float64[n], likewise: the precision times the mean."""
        moment: Floats = self._taken_in()[:, -1]
        return moment

    def learn_row(self, x: Sequence[float], y: float, weight: float) -> None:
        """One completion: its features, and the seconds it took."""
        self._untaken.append((*x, y, weight))
        self._lessons += 1
        if self._lessons <= SOLVE_ALL or self._lessons % SOLVE_EVERY == 0:
            self._sums = self._taken_in()
            self._untaken.clear()
            self.weights = self.solve()

    def solve(self) -> tuple[float, ...]:
        """The most likely weights that are not negative: the most negative one is dropped until none is."""
        precision, moment = self.precision, self.moment
        found: list[float] = np.linalg.solve(precision, moment).tolist()
        if min(found) >= 0:
            return tuple(found)
        kept = list(range(self._n_features))
        while len(kept) > 1 and min(found) < 0:
            del kept[found.index(min(found))]
            found = np.linalg.solve(precision[np.ix_(kept, kept)], moment[kept]).tolist()
        weights = dict(zip(kept, found, strict=True))
        return tuple([max(0.0, weights.get(at, 0.0)) for at in range(self._n_features)])

    def export(self) -> Sums:
        """All that was learned so far; looking changes nothing."""
        return Sums(
            precision=tuple(self.precision.ravel().tolist()),
            moment=tuple(self.moment.tolist()),
            weights=self.weights,
        )

    def restore(self, sums: Sums) -> None:
        """Take over what was learned elsewhere; it must be sound."""
        precision = np.array(sums.precision).reshape(self._n_features, self._n_features)
        self._sums = np.column_stack([precision, np.array(sums.moment)])
        self._untaken.clear()
        self.weights = sums.weights

    def _taken_in(self) -> Floats:
        """The sums as if every lesson were in them; changes nothing."""
        if not self._untaken:
            return self._sums
        fading = self._fading[-len(self._untaken) - 1 :]
        rows = np.array(self._untaken)
        # Rooted, so that the precision is symmetric to the last bit.
        rows = rows[:, :-1] * np.sqrt(rows[:, -1:] * fading[1:, None])
        taken: Floats = fading[0] * self._sums + (1.0 - fading[0]) * self._prior
        taken += rows[:, :-1].T @ rows
        return taken


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
