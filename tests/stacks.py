"""The whole system as a user starts it: `headgate up`, ready and ended with the block."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tied import tied

HEADGATE = Path(sys.executable).with_name("headgate")


@contextlib.contextmanager
def up(directory: Path, *words: object) -> Iterator[dict]:
    """The line that says all is ready; it must end well."""
    process = subprocess.Popen(
        tied(HEADGATE, "up", *words, "--json", "--directory", directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )
    try:
        line = process.stdout.readline()
        yield json.loads(line) if line else pytest.fail(process.communicate()[1])
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
