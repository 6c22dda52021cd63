"""What an emulated server is told at its start, under vLLM's names where it has one."""

from typing import Literal

import msgspec

from scheduler.sim.arguments import EngineSettings


class KvExtra(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv_connector_extra_config`."""

    kv_lease_duration: float = 30.0
    "Wall seconds that a prompt's KV is kept for whoever decodes."


class KvTransfer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--kv-transfer-config`, as far as it is emulated, and the link that the real one has."""

    kv_connector: Literal["NixlConnector"] = "NixlConnector"

    kv_role: Literal["kv_producer", "kv_consumer", "kv_both"] = "kv_both"
    "Said and not looked at, as by that connector."

    kv_load_failure_policy: Literal["fail", "recompute"] = "fail"
    "Where KV is not to be had: an error, or the prompt is computed here."

    kv_connector_extra_config: KvExtra = KvExtra()

    link_gbps: float = 100.0
    "Gigabits a second; of the two ends' the smaller holds. No setting of vLLM's."

    host: str = ""
    "Where others find it, as VLLM_NIXL_SIDE_CHANNEL_HOST says; empty: where it listens. No setting of vLLM's."

    def __post_init__(self) -> None:
        if not self.link_gbps > 0:
            raise ValueError(f"link_gbps is {self.link_gbps}, more than 0 wanted")


class EmulatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One emulated server."""

    profile: str = "a100"
    "The GPU and model whose step times it takes: a name or alias of `scheduler.sim.profile`."

    model: str = "emulated"
    "The name it serves under; requests for any other get a 404."

    host: str = "127.0.0.1"

    port: int = 0
    "0 picks a free one."

    time_scale: float = 1.0
    """
    How much faster than the wall clock the engine lives.

    At 10 a step of 30 ms takes 3. `/metrics` and per-request metrics speak of the engine's
    own seconds, a client's clock of wall seconds.
    """

    engine: EngineSettings = EngineSettings()

    max_model_len: int | None = None
    "Longest prompt plus output, at most what the KV cache holds; None for just that."

    seed: int = 0
    "Of step noise, stalls and jitter."

    jitter: float = 0.0
    "Spread of the profile's coefficients: each is multiplied by 1 - jitter ... 1 + jitter."

    slowdown: float = 1.0
    "Factor on every step's time."

    frontend: bool = True
    "Whether a request spends front-end time before it reaches the engine."

    frontend_s: float | None = None
    "How much; None: the profile's, as measured on that GPU's own server."

    shutdown_timeout_s: float = 0.0
    "Wall seconds that running requests get after SIGTERM; 0 aborts them at once."

    enable_per_request_metrics: bool = False
    "Times of the request in its last chunk."

    enable_prompt_tokens_details: bool = True
    "`usage.prompt_tokens_details.cached_tokens`."

    enable_force_include_usage: bool = False
    "A usage chunk also where the client did not ask for one."

    kv_events: bool = False
    "Whether it publishes what its cache stores and forgets, on free ports; `/kv_event_sources` says where."

    kv_transfer: KvTransfer | None = None
    "How it hands KV over; None: it does not."

    allow_faults: bool = False
    "Whether `POST /emulator/fault` exists."

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty, a name wanted")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}, at least 1 wanted")
        for name in ("time_scale", "slowdown"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, more than 0 wanted")
        if self.frontend_s is not None and self.frontend_s < 0:
            raise ValueError(f"frontend_s is {self.frontend_s}, at least 0 wanted")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}, at least 0 and below 1 wanted")
