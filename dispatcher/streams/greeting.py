"""What passes between us and a server before anything else: is it one that we know, and does it know our functions."""

from importlib import resources
from typing import Any

import redis.exceptions

from dispatcher.streams.weather import Weather
from scheduler.errors import StreamError

FLOOR = (7, 0)
"Functions and a group's lag came with Redis 7.0; every Valkey has them."


async def check_version(client: Any, shown: str) -> None:
    """Refuse a server that is too old, and one that does not speak as we do.

    Raises:
        StreamError: says what was found and what is wanted.
    """
    try:
        with Weather(shown):
            info = await client.info("server")
    except StreamError as error:
        if _is_without_hello(str(error)):
            raise StreamError(
                f"redis at {shown} does not know HELLO, so it is older than 6.0; wanted 7.0 or newer"
            ) from None
        if hint := _about_tls(str(error), is_secure=shown.startswith("rediss")):
            raise StreamError(f"{error} {hint}") from None
        raise
    # A cluster answers by node.
    info = next(iter(info.values())) if "redis_version" not in info else info
    found = str(info["redis_version"])
    if tuple(int(part) for part in found.split(".")[:2]) < FLOOR:
        raise StreamError(f"redis at {shown} is {found}, wanted 7.0 or newer")


async def load_functions(client: Any, shown: str) -> None:
    """Give it our functions, or leave that to who may: a dispatcher that leads."""
    code = resources.files("dispatcher.streams").joinpath("functions.lua").read_text()
    with Weather(shown):
        try:
            await client.function_load(code, replace=True)
        except (
            # Where ACL users are told apart only a dispatcher may load, since functions run with their
            # caller's rights. Until one has, every call says "Function not found".
            redis.exceptions.NoPermissionError,
            # One may look at a replica and at a server that is full, and lead the latter.
            redis.exceptions.ReadOnlyError,
            redis.exceptions.OutOfMemoryError,
        ):
            return


def _about_tls(complaint: str, *, is_secure: bool) -> str:
    """What to try where one side may speak TLS and the other not: neither then says so."""
    if is_secure and "Timeout connecting" in complaint:
        return "(does it speak TLS? if not: redis://)"
    if not is_secure and any(word in complaint for word in ("closed by server", "reset by peer")):
        return "(does it want TLS? if so: rediss://)"
    return ""


def _is_without_hello(complaint: str) -> bool:
    lowered = complaint.lower()
    return "unknown command" in lowered and "hello" in lowered
