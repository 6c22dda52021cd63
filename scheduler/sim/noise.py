"""What makes two equal steps differ: log-normal noise and rare stalls."""

import math

import numpy as np

_DRAWS = 1024
"Drawn at a time: a numpy call costs the same for one as for a thousand."


class Noise:
    """Disturbs step times with chance that is handed in.

    >>> Noise(None).disturb(0.010)
    0.01
    """

    __slots__ = ("_factors", "_rng", "_sigma", "_stall_probability", "_stall_s")

    def __init__(
        self,
        rng: np.random.Generator | None,
        *,
        sigma: float = 0.0,
        stall_probability: float = 0.0,
        stall_s: float = 0.0,
    ) -> None:
        if rng is None and (sigma or stall_probability):
            raise ValueError(
                f"step noise {sigma} and stall probability {stall_probability} need a generator"
            )
        self._rng = rng
        self._sigma = sigma
        self._stall_probability = stall_probability
        self._stall_s = stall_s
        self._factors: list[tuple[float, float]] = []

    @property
    def is_silent(self) -> bool:
        return not (self._sigma or self._stall_probability)

    def disturb(self, duration_s: float) -> float:
        """The step's time as it came out this once; its mean without stalls is unchanged."""
        if not self._sigma and not self._stall_probability:
            return duration_s
        if not self._factors:
            self._draw()
        factor, stall_s = self._factors.pop()
        return duration_s * factor + stall_s

    def _draw(self) -> None:
        assert self._rng is not None
        shift = -(self._sigma**2) / 2  # keeps the mean at 1
        factors = np.exp(self._rng.normal(shift, self._sigma, _DRAWS))
        is_stalled = self._rng.random(_DRAWS) < self._stall_probability
        stalls = np.where(is_stalled, self._stall_s, 0.0)
        assert math.isfinite(float(factors.sum()))
        self._factors = list(zip(factors.tolist(), stalls.tolist(), strict=True))
