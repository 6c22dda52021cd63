"""Our own child processes: started together, restarted when they die, ended together, never left behind.

A child says one line of JSON on stdout when it is ready; what else it says goes to its log. The kernel ends it with
its parent (Linux), also when that is killed.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from scheduler.errors import UNREADABLE, StreamError

READY_S = 60.0
"Importing takes about a second a child; two cores start a dozen of them at once."

STEADY_S = 10.0
"A child that lived so long is restarted at once; one that did not waits longer each time."

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0

LAST_WORDS = 400
"Characters of a log that are shown when a child does not start."

# The child leaves our process group, so that Ctrl-C reaches us alone and we can drain; then it asks the kernel to
# end it with us. Not preexec_fn, which may deadlock in a process with threads.
_TIE = """\
import ctypes, os, signal, sys
os.setsid()
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

Ready = dict[str, Any]


class Child:
    """One child.

    1. `start` returns what it said when it was ready.
    2. `watch` restarts it whenever it ends, with what it said the first time at hand (its port, for one).
    3. `stop` asks it to end, and ends it when it does not.
    """

    def __init__(
        self,
        name: str,
        words: Callable[[Ready | None], Sequence[str]],
        *,
        environ: Mapping[str, str],
        directory: Path,
    ) -> None:
        """`words` gives the sub-command and its options, the second time with what was said the first time."""
        self.name = name
        self.log = directory / f"{name}.log"
        self.ready: Ready = {}
        self._words = words
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None
        self._echo: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def pid(self) -> int | None:
        """Its process; None before the start."""
        return None if self._process is None else self._process.pid

    async def start(self) -> Ready:
        """Start it and return what it says when it is ready.

        Raises:
            StreamError: it ended, or said nothing for too long; with the last words of its log.
        """
        command = [sys.executable, "-m", "dispatcher.cli", *self._words(self.ready or None)]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-ISc", _TIE, str(os.getpid()), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=dict(self._environ),
            )
        try:
            async with asyncio.timeout(READY_S):
                self.ready = await self._first_line()
        except (TimeoutError, *UNREADABLE):
            await self.stop(grace_s=0.0)
            words = self.log.read_text(errors="replace")[-LAST_WORDS:].strip()
            raise StreamError(
                f"{self.name} did not start: {words or 'it said nothing'} ({self.log})"
            ) from None
        self._echo = asyncio.create_task(self._keep_reading(), name=f"echo-{self.name}")
        return self.ready

    async def watch(self, told: Callable[[str], None]) -> None:
        """Restart it whenever it ends, until it is stopped."""
        delay_s = BACKOFF_FIRST_S
        loop = asyncio.get_running_loop()
        while True:
            began_at = loop.time()
            assert self._process is not None
            code = await self._process.wait()
            if self._is_stopping:
                return
            if loop.time() - began_at > STEADY_S:
                delay_s = BACKOFF_FIRST_S
            told(f"{self.name} ended with {code}, starting it again in {delay_s:g} s; {self.log}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, BACKOFF_MAX_S)
            try:
                await self.start()
            except StreamError as error:
                told(str(error))
                self._is_stopping = False

    async def stop(self, *, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to who is still there after the grace."""
        self._is_stopping = True
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._echo is not None:
            await self._echo
            self._echo = None

    async def _first_line(self) -> Ready:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        return msgspec.json.decode(line, type=Ready)

    async def _keep_reading(self) -> None:
        """A pipe that nobody reads would stop the child."""
        assert self._process is not None
        out = self._process.stdout
        assert out is not None
        with self.log.open("ab") as log:
            await _copy(out, log)


async def _copy(source: asyncio.StreamReader, sink: IO[bytes]) -> None:
    while part := await source.read(1 << 16):
        sink.write(part)
        sink.flush()
