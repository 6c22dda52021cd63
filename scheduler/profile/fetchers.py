"""Columns that built-in parts read. One of your own that provides the same column takes its place."""

from typing import ClassVar

from scheduler.profile.parts import Fetcher
from scheduler.profile.scene import Scene
from scheduler.state import Floats

PREFIX_MATCH = "prefix-match"
"Part of the prompt in each endpoint's prefix cache, 0 to 1."

LATENCY = "predicted-latency"
"Predicted seconds to the first token."

WORTH = "pace-worth"
"""
Promises per token kept with the request there, less those broken of others, by weight. The plan itself makes this
column, from what it has learned of decoding; it is 1 everywhere while nobody was promised a pace.
"""


class PrefixMatch(Fetcher, frozen=True, tag="prefix-cache-fetcher"):
    """By the dispatcher's prefix index: contiguous blocks, corrected by what engines report."""

    provides: ClassVar[str] = PREFIX_MATCH

    def fetch(self, scene: Scene) -> Floats:
        """Cached over all."""
        share: Floats = scene.cached_tokens / scene.prompt_tokens
        return share


class Latency(Fetcher, frozen=True, tag="predicted-latency-fetcher"):
    """By the learned cost model: what stands before it there, and its own prefill."""

    provides: ClassVar[str] = LATENCY

    def fetch(self, scene: Scene) -> Floats:
        """Seconds."""
        return scene.first_token_s


BUILT_IN = (PrefixMatch, Latency)

AnyFetcher = PrefixMatch | Latency | Fetcher
