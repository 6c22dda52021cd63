"""What an endpoint declares in its beats: as the lab's endpoints say it, and as a recording's are taken at their word."""

from typing import Literal

from msgspec import structs

from scheduler.sim import profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fleet import Chance, Machine
from scheduler.sim.profile import Profile
from scheduler.wire.worker import Beat

UNKNOWN = "a100"
"The profile of hardware that none of ours is: the middle of the field."

STEP_NOISE = Chance().step_noise


def beat(machine: Machine, models: tuple[str, ...], *, publishes: bool = False) -> Beat:
    """All that does not change while it lives.

    Args:
        machine: what it is.
        models: what it serves.
        publishes: whether the engine says what it caches.
    """
    settings = machine.settings
    return Beat(
        endpoint=machine.name,
        epoch=1,
        models=models,
        hardware=machine.hardware,
        max_num_seqs=settings.max_num_seqs,
        kv_tokens=machine.kv_tokens,
        block_tokens=settings.block_size,
        no_prefix_cache=not settings.prefix_caching,
        max_model_len=machine.tokens_max,
        roles=(machine.role,),
        link_gbps=machine.link_gbps,
        kv_token_bytes=machine.nominal.kv_bytes_per_token,
        features=("kv_events",) if publishes else (),
    )


def machine(beat: Beat, seed: int) -> Machine | None:
    """The endpoint that says this of itself, with the profile of its hardware; None where it takes no request's part.

    Args:
        beat: what it said.
        seed: of its step noise.
    """
    role = _role(beat)
    if role is None:
        return None
    nominal, usual = _profile(beat), EngineSettings()
    block_size = beat.block_tokens or usual.block_size
    return Machine(
        name=beat.endpoint,
        hardware=beat.hardware,
        nominal=nominal,
        actual=nominal,
        settings=EngineSettings(
            max_num_seqs=max(1, min(beat.max_num_seqs, usual.max_num_batched_tokens)),
            block_size=block_size,
            kv_tokens=beat.kv_tokens if beat.kv_tokens >= block_size else None,
            prefix_caching=not beat.no_prefix_cache,
            step_noise=STEP_NOISE,
        ),
        seed=seed,
        role=role,
        link_gbps=beat.link_gbps,
        models=beat.models,
        context_tokens=beat.max_model_len,
    )


def _role(beat: Beat) -> Literal["both", "prefill", "decode"] | None:
    """As the core reads it: whoever decodes serves whole requests, and without a link nobody prefills for others."""
    if "both" in beat.roles:
        return "both"
    if "decode" in beat.roles:
        return "decode"
    return "prefill" if "prefill" in beat.roles and beat.link_gbps > 0 else None


def _profile(beat: Beat) -> Profile:
    plain = beat.hardware.lower().replace("nvidia", "").strip(" -_")
    known = [name for name in profile.ALIASES if plain.startswith(name)]
    found = profile.load(max(known, key=len) if known else UNKNOWN)
    if not beat.kv_token_bytes:
        return found
    return structs.replace(found, kv_bytes_per_token=beat.kv_token_bytes)
