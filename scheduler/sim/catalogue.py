"""Fleets by name: those of the evaluation, as the command line knows them.

`pd-` names what prefills, then what decodes, over links of 320 Gbit/s, or of 80 where it ends in `-80g`.
"""

from scheduler.errors import SettingsError
from scheduler.sim import fleet
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fleet import EndpointSpec, Fleet, Links


def named(name: str) -> Fleet:
    """A fleet by name.

    Raises:
        SettingsError: there is none of that name.
    """
    if name not in FLEETS:
        raise SettingsError(f"fleet is {name!r}, wanted a TOML file or one of: {', '.join(FLEETS)}")
    network = Links(link_gbps=80.0) if name.endswith("-80g") else Links()
    return fleet.checked(Fleet(name=name, endpoints=FLEETS[name], network=network))


# vLLM's own default budget of new tokens a step is 8192 on an H100 and 2048 on smaller GPUs.
H100_ENGINE = EngineSettings(max_num_batched_tokens=8192)

# As in Lodestar's V100 set-up (no FlashAttention-2): neither prefix cache nor chunked prefill. The budget must then
# hold the longest prompt whole.
V100_ENGINE = EngineSettings(
    prefix_caching=False, chunked_prefill=False, max_num_batched_tokens=32_768
)


def _parted(prefill: str, n_prefill: int, decode: str, n_decode: int) -> tuple[EndpointSpec, ...]:
    """So many that prefill and so many that decode."""
    settings = dict.fromkeys(("h100", "h100-70b"), H100_ENGINE)
    return (
        EndpointSpec(
            profile=prefill,
            count=n_prefill,
            role="prefill",
            engine=settings.get(prefill, EngineSettings()),
        ),
        EndpointSpec(
            profile=decode,
            count=n_decode,
            role="decode",
            engine=settings.get(decode, EngineSettings()),
        ),
    )


FLEETS: dict[str, tuple[EndpointSpec, ...]] = {
    "a30x8": (EndpointSpec(profile="a30", count=8),),
    "a30x4-v100x4": (
        EndpointSpec(profile="a30", count=4),
        EndpointSpec(profile="v100", count=4, engine=V100_ENGINE),
    ),
    "mixed-h100-a100-l40s": (
        EndpointSpec(profile="h100", count=2, engine=H100_ENGINE),
        EndpointSpec(profile="a100", count=2),
        EndpointSpec(profile="l40s", count=4),
    ),
    "a100x4": (EndpointSpec(profile="a100", count=4),),
    "h100x8": (EndpointSpec(profile="h100", count=8, engine=H100_ENGINE),),
    "agents-h100-l40s": (
        EndpointSpec(profile="h100", count=1, engine=H100_ENGINE),
        EndpointSpec(profile="l40s", count=3),
    ),
    "pd-a100x4-a100x4": _parted("a100", 4, "a100", 4),
    "pd-a100x4-a100x4-80g": _parted("a100", 4, "a100", 4),
    "pd-h100-70bx4-h100-70bx4": _parted("h100-70b", 4, "h100-70b", 4),
    "pd-h100x8-a100x4": _parted("h100", 8, "a100", 4),
    "pd-h100x8-h100x4": _parted("h100", 8, "h100", 4),
}
