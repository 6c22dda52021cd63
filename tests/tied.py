"""Ties what a test starts to the test's own process: nothing of it outlives a run that was killed.

A test that runs into its time limit ends by `os._exit`, as `timeout_method = "thread"` has it, and no fixture has its turn.
"""

import sys

_LAUNCH = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""


def tied(program, *words):
    """The command that runs this one, and that the kernel asks to end when we do (Linux; elsewhere nobody asks)."""
    return [sys.executable, "-c", _LAUNCH, str(program), *map(str, words)]
