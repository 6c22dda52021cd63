"""Whom an engine refuses at its door, and in which words."""

from collections.abc import Collection

from scheduler.sim.arguments import EngineSettings
from scheduler.sim.sequence import Sequence


class QueueFullError(Exception):
    """The engine's admission limit refused a request; `reason` names the limit."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_limits(settings: EngineSettings, present: Collection[Sequence]) -> None:
    """Whether a newcomer would be taken in beside these.

    As vLLM, whose limits count more than their names say: who runs too, and prompts under way whole.

    Raises:
        QueueFullError: a limit on requests or on prompt tokens is reached.
    """
    limit = settings.max_num_queued_reqs
    if limit is not None and len(present) >= limit:
        raise QueueFullError(
            "max_num_queued_reqs",
            "The engine is currently busy and cannot accept new requests. "
            "Please try again later or on a different instance.",
        )
    limit = settings.max_num_queued_tokens
    if limit is not None and _tokens_before_first(present) >= limit:
        raise QueueFullError(
            "max_num_queued_tokens",
            "The engine has reached its prefill token backlog limit. "
            "Please try again later or on a different instance.",
        )


def check_size(sequence: Sequence, settings: EngineSettings, kv_tokens: int) -> None:
    """Whether it could ever run in a KV cache of so many tokens.

    Raises:
        ValueError: it could not.
    """
    tokens = sequence.prompt_tokens + sequence.stop_after
    if tokens > kv_tokens:
        raise ValueError(
            f"sequence {sequence.id!r} grows to {tokens} tokens, the KV cache holds {kv_tokens}"
        )
    if not settings.chunked_prefill and tokens > settings.max_num_batched_tokens:
        raise ValueError(
            f"sequence {sequence.id!r} grows to {tokens} tokens; without chunked prefill "
            f"at most max_num_batched_tokens ({settings.max_num_batched_tokens}) can run"
        )


def _tokens_before_first(present: Collection[Sequence]) -> int:
    """Prompt tokens of all who have not said anything yet."""
    return sum(s.prompt_tokens for s in present if s.first_token_at is None)
