"""How long an engine's steps take: what its profile says, as chance and faults leave it."""

from scheduler.sim.noise import Noise
from scheduler.sim.profile import Profile


class Durations:
    """Seconds of single steps, and of stretches in which the same sequences decode."""

    __slots__ = ("_floors_s", "_noise", "_profile", "slowdown")

    def __init__(self, profile: Profile, noise: Noise) -> None:
        self.slowdown = 1.0
        "Factor on every step's time; for fault injection."
        self._profile = profile
        self._noise = noise
        self._floors_s: dict[int, float] = {}
        "By number of decodes: a step of theirs that reads no KV."

    def step_s(
        self, n_seqs: int, new_tokens: int, prefill_attention: int, decode_context: int
    ) -> float:
        """One step, as it came out this once; arguments as `Profile.step_s` has them."""
        step_s = self._profile.step_s(n_seqs, new_tokens, prefill_attention, decode_context)
        return self._noise.disturb(step_s) * self.slowdown

    def quiet_s(self, n_steps: int, n_decodes: int, context: int) -> float:
        """So many steps of these decodes and of nothing else, in the mean; `context`: KV tokens that the first reads."""
        first_s = self._profile.step_s(n_decodes, n_decodes, decode_context=context)
        grown_s = self._profile.decode_context_s * n_decodes * (n_steps - 1) / 2
        return n_steps * (first_s + grown_s) * self.slowdown

    def quiet_ends(
        self, now: float, until: float, n_most: int, n_decodes: int, context: int
    ) -> list[float]:
        """When each of these decodes' steps ends, up to the first that does at or after `until`."""
        floor_s = self._floors_s.get(n_decodes)
        if floor_s is None:
            floor_s = self._profile.step_s(n_decodes, n_decodes)
            self._floors_s[n_decodes] = floor_s
        slope_s = self._profile.decode_context_s
        step_s = floor_s + slope_s * context
        grow_s = slope_s * n_decodes
        disturb = None if self._noise.is_silent else self._noise.disturb
        slowdown = self.slowdown
        ends = []
        for _ in range(n_most):
            now += (step_s if disturb is None else disturb(step_s)) * slowdown
            ends.append(now)
            if now >= until:
                break
            step_s += grow_s
        return ends
