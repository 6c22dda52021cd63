"""How long one engine step takes on a given GPU.

A step's time is the sum of what the hardware must do in it: launch kernels, read the
weights or multiply the new tokens (whichever is longer, softly), attend over prompts,
and read the KV cache of everybody who decodes. The coefficients were fitted to measured
tables; `profiles.json` beside this file says for each which ones, how well, and what was
only derived from a data sheet.
"""

from functools import cache
from importlib import resources

import msgspec
import numpy as np

from scheduler.errors import SettingsError


class Coefficients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fitted terms of a step, all in milliseconds."""

    t0: float
    "Every step: launches, scheduling, all-reduce latency."

    r: float
    "Per sequence in the step: sampling and bookkeeping."

    w: float
    "Reading the weights once: the floor of a small step."

    g: float
    "Per thousand new tokens: the matrix products of a large step."

    ap: float
    "Per million (query, key) pairs of prefill attention."

    ad: float
    "Per thousand tokens of KV cache read by decoding sequences."

    mx: float
    "How much slower those reads are when the step also carries prefill."


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one GPU: step times and memory."""

    name: str
    "Full name, `gpu|model|parallelism`."

    coef: Coefficients

    k: float
    "Sharpness of the bend between reading weights and multiplying tokens."

    extra_ms_per_step: float
    "What a real server loses in each step beside its kernels."

    frontend_ms: float
    "HTTP, tokeniser and hand-over to the engine: a delay before the queue, once a request."

    kv_tokens: int
    "Tokens the KV cache holds."

    kv_bytes_per_token: int
    "What a hand-over between endpoints must move."

    source: str
    "Where the fitted measurements come from, with licence."

    status: str
    "`measured ...`, `composed from measured kernels` or `derived, not measured`."

    note: str

    fit_key: str | None = None

    fit_error_pct: dict[str, dict[str, float]] | None = None
    "Errors of the fit by kind of step; None for a derived profile."

    @property
    def frontend_s(self) -> float:
        return self.frontend_ms / 1e3

    @property
    def decode_context_s(self) -> float:
        """Seconds per KV token read in a step of decodes only: the slope between two steps."""
        return self.coef.ad / 1e6

    def step_s(
        self,
        n_seqs: int,
        new_tokens: int,
        prefill_attention: int = 0,
        decode_context: int = 0,
    ) -> float:
        """Seconds of one step.

        Args:
            n_seqs: sequences that take part.
            new_tokens: tokens computed, one for each decode and the chunks of the prefills.
            prefill_attention: (query, key) pairs of the prefill chunks: a chunk of q tokens
                behind s computed ones counts q * s + q * q / 2, since it is causal.
            decode_context: tokens of KV cache read by the decodes.

        >>> 0.007 < load("h100").step_s(1, 1, decode_context=100) < 0.0075
        True
        """
        c = self.coef
        is_mixed = prefill_attention > 0
        products: float = (c.w**self.k + (c.g * new_tokens / 1e3) ** self.k) ** (1 / self.k)
        attention = c.ap * prefill_attention / 1e6
        reading = c.ad * decode_context / 1e3 * (c.mx if is_mixed else 1.0)
        milliseconds = c.t0 + self.extra_ms_per_step + c.r * n_seqs + products + attention + reading
        return milliseconds / 1e3

    def slowed(self, factor: float) -> "Profile":
        """The same hardware in slow motion: every step takes `factor` times as long, whatever is in it.

        >>> fast = load("a30")
        >>> round(fast.slowed(5.0).step_s(9, 700, 90_000, 8000) / fast.step_s(9, 700, 90_000, 8000), 9)
        5.0
        """
        times = ("t0", "r", "w", "g", "ap", "ad")
        changed = {name: factor * getattr(self.coef, name) for name in times}
        return msgspec.structs.replace(
            self,
            coef=msgspec.structs.replace(self.coef, **changed),
            extra_ms_per_step=factor * self.extra_ms_per_step,
        )

    def jittered(self, rng: np.random.Generator, spread: float) -> "Profile":
        """The same hardware as another specimen: each coefficient times 1 - spread ... 1 + spread.

        >>> load("h100").jittered(np.random.default_rng(0), 0.0) == load("h100")
        True
        """
        names = Coefficients.__struct_fields__
        factors = rng.uniform(1 - spread, 1 + spread, len(names)).tolist()
        changed = {
            name: getattr(self.coef, name) * factor
            for name, factor in zip(names, factors, strict=True)
        }
        return msgspec.structs.replace(self, coef=Coefficients(**changed))


ALIASES = {
    "h100": "h100-80g|llama-3.1-8b|tp1",
    "a100": "a100-80g|llama-3.1-8b|tp1",
    "l40s": "l40s-48g|llama-3.1-8b|tp1",
    "a30": "a30-24g|llama-3.1-8b|tp1",
    "v100": "v100-32g|llama-3.1-8b|tp1",
    "h100-70b": "h100-80g|llama-3.1-70b|tp4",
    "a100-70b": "a100-80g|llama-2-70b|tp8",
}
"Short names for the command line; each stands for one full name."


def load(name: str) -> Profile:
    """The profile of a full name or an alias.

    Raises:
        SettingsError: there is no such profile; the message lists those there are.
    """
    profiles = _shipped()
    profile = profiles.get(ALIASES.get(name, name))
    if profile is None:
        known = ", ".join([*ALIASES, *profiles])
        raise SettingsError(f"profile {name!r} is not one of: {known}")
    return profile


class _Document(msgspec.Struct):
    profiles: dict[str, dict[str, object]]


@cache
def _shipped() -> dict[str, Profile]:
    raw = (resources.files(__package__) / "profiles.json").read_bytes()
    records = msgspec.json.decode(raw, type=_Document).profiles
    return {
        name: msgspec.convert({"name": name, **record}, Profile) for name, record in records.items()
    }
