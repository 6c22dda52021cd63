"""What handing a prompt's KV over costs: seconds from the decode worker's pull to the first token, learned.

    seconds = speed[endpoint] * weights . (handshake, its own bytes, bytes before it on the link, one decode step)

All four are in seconds by the declared link and the predicted step, so untaught weights are one. As for prefill, a
regression shared by the fleet learns the weights, and one log-speed an endpoint how that link differs.
"""

import math
from collections.abc import Sequence

import numpy as np

from scheduler import cost, regression
from scheduler.regression import DecayedRegression, Sums
from scheduler.speed import Speeds
from scheduler.state import Floats
from scheduler.wire.worker import Beat, Reward

FEATURES = ("kv_handshake", "kv_own", "kv_ahead", "kv_step")
"As they ride in a decode leg's job and reward."

HANDSHAKE_S = 0.005
"Of a transfer on a warm connection: NIXL between two vLLM servers takes 5 to 40 ms in all, most of it a step's wait."

LINK_MIN, LINK_MAX = 1e7, 1e14
"Bytes a second that any declared link is believed to carry."

TOKEN_BYTES_MAX = 1 << 30
"The most that a token's KV is believed to take."

SECONDS_MAX = 3600.0
"No transfer takes an hour: what says so is no measurement."


class Transfer:
    """What handing KV over takes on every endpoint's link."""

    def __init__(self) -> None:
        """Untaught: as declared."""
        self._regression = DecayedRegression(np.ones(len(FEATURES)))
        self.speeds = Speeds()
        self.links: Floats = np.zeros(0)
        "Bytes a second each link carries; 0: it hands nothing over."
        self.token_bytes: Floats = np.zeros(0)
        "One token's KV."

    def open(self, slot: int, beat: Beat) -> None:
        """An endpoint takes this slot, as declared."""
        self.speeds.open(slot)
        if slot == len(self.links):
            self.links = np.append(self.links, 0.0)
            self.token_bytes = np.append(self.token_bytes, 0.0)
        link = beat.link_gbps * 1e9 / 8
        self.links[slot] = min(LINK_MAX, max(LINK_MIN, link)) if link > 0 else 0.0
        declared = min(TOKEN_BYTES_MAX, max(0, beat.kv_token_bytes))
        self.token_bytes[slot] = declared or cost.KV_BYTES

    def export(self) -> Sums:
        """What the whole fleet has taught."""
        return self._regression.export()

    def restore(self, sums: Sums) -> None:
        """Take that over; it must be sound."""
        self._regression.restore(sums)

    def seconds(self, own: Floats, ahead: Floats, step_s: Floats, link: Floats) -> Floats:
        """From the pull to the first token, on every slot; float64[n_slots] all.

        Args:
            own: bytes to fetch.
            ahead: bytes that others fetch there.
            step_s: one decode step.
            link: bytes a second between the two ends.
        """
        handshake, per_own, per_ahead, per_step = self._regression.weights
        seconds: Floats = np.exp(self.speeds.log) * (
            handshake * HANDSHAKE_S
            + (per_own * own + per_ahead * ahead) / np.maximum(link, LINK_MIN)
            + per_step * step_s
        )
        return seconds

    def features(self, *, own: float, ahead: float, step_s: float, link: float) -> tuple[str, ...]:
        """What is seen at this decision, as it rides in the job and comes back in the reward."""
        link = max(link, LINK_MIN)
        values = (HANDSHAKE_S, own / link, ahead / link, step_s)
        return tuple(f"{name}={value:.6g}" for name, value in zip(FEATURES, values, strict=True))

    def learn(self, reward: Reward, slot: int) -> None:
        """One decode leg has begun to speak; whatever is no measurement teaches nothing."""
        row = _parsed(reward.features)
        if row is None or reward.first_token_at is None:
            return
        begun_at = reward.pulled_at if reward.pulled_at is not None else reward.admitted_at
        if begun_at is None or not 1e-4 <= reward.first_token_at - begun_at <= SECONDS_MAX:
            return
        seconds = reward.first_token_at - begun_at
        speed = math.exp(self.speeds.log[slot])
        weights = self._regression.weights
        predicted_s = speed * sum(w * x for w, x in zip(weights, row, strict=True))
        log_error = math.log(seconds / max(1e-4, predicted_s))
        weight = regression.weight(log_error, 0.5 * (predicted_s + seconds) / speed)
        self._regression.learn_row(row, seconds / speed, weight)
        self.speeds.learn(slot, log_error)


def _parsed(features: Sequence[str]) -> tuple[float, ...] | None:
    """The features as a row; None unless every one is there and a sane number."""
    values: dict[str, float] = {}
    for feature in features[: 2 * len(FEATURES)]:
        name, _, text = feature.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            return None
    row = tuple(values.get(name, math.nan) for name in FEATURES)
    return row if all(0 <= value <= SECONDS_MAX for value in row) else None
