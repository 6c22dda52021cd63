"""An engine's arguments, under vLLM's names."""

from math import inf
from typing import Literal

import msgspec


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine's arguments, under vLLM's names where it has one."""

    max_num_seqs: int = 256
    "Sequences that run together."

    max_num_batched_tokens: int = 2048
    "New tokens of one step; at least `max_num_seqs`, as vLLM demands."

    long_prefill_token_threshold: int = 0
    "Tokens of one prompt in one step; 0 for no such limit."

    chunked_prefill: bool = True
    "Whether a prompt may be spread over steps; if not it must fit the budget whole."

    block_size: int = 16
    "Tokens of one KV block."

    kv_tokens: int | None = None
    "Tokens the KV cache holds; None for the profile's own figure."

    prefix_caching: bool = True

    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    "`priority` orders the waiting line and picks victims; it never preempts for a slot."

    reserve_full_isl: bool = True
    "Admit a prompt only when all of it fits the free blocks, not just its first chunk."

    max_num_queued_reqs: int | None = None
    "Requests that may be in the engine, running or waiting; None for no limit."

    max_num_queued_tokens: int | None = None
    "Once so many prompt tokens are before their first token, the next request is refused; None for no limit."

    step_noise: float = 0.0
    "Sigma of the log-normal factor on every step."

    stall_probability: float = 0.0
    "Chance of a step to stall."

    stall_s: float = 0.2

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 1 wanted")
        if self.kv_tokens is not None and self.kv_tokens < self.block_size:
            raise ValueError(
                f"kv_tokens is {self.kv_tokens}, at least a block ({self.block_size}) wanted"
            )
        for name in ("max_num_queued_reqs", "max_num_queued_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"{name} is {limit}, at least 1 or none wanted")
        if not 0 <= self.stall_probability <= 1:
            raise ValueError(f"stall_probability is {self.stall_probability}, 0 to 1 wanted")
        for name in ("step_noise", "stall_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}, at least 0 wanted")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, "
                f"at least max_num_seqs ({self.max_num_seqs}) wanted"
            )
