"""A private Redis beside us, for a machine that has none to offer.

A URL that was given is used and nothing is ever started; else the program that `binary.find` finds.
We start the binary ourselves: wrappers clean up in `atexit`, so a killed parent leaves the server behind.
Here the kernel ends it (Linux), a lock keeps two starters apart, and a run file lets a second one join in.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from dispatcher import binary
from dispatcher.resp import Connection, Failure
from scheduler.errors import UNREADABLE, StreamError
from scheduler.settings import RedisSettings

READY_S = 30.0
"Loading a large append-only file is slow; an empty one takes 0.1 s."

STOP_S = 10.0
"SIGTERM writes the append-only file out; after this long we kill."

KNOCK_S = 1.0
"How long one PING may take before the server counts as absent."

POLL_S = 0.005
PORT_TRIES = 5
"A free port may be taken between our asking and the server's binding."

ANNOUNCED = "latest"
"File of the state directory: where the private server lies that was started last."

SOCKET_PATH_BYTES = 100
"A unix socket's path holds 108 bytes on Linux and 104 on macOS; a longer one is left out."

# The child first leaves our process group (so that Ctrl-C reaches us alone and we can drain), then asks the
# kernel to end it with us. Not preexec_fn, which may deadlock in a process with threads.
_EXEC = """\
import ctypes, os, signal, sys
os.setsid()
if sys.argv[1] != "0":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class RunFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `redis.json` says about the server that runs in its directory."""

    pid: int
    port: int

    socket: str
    "Its unix socket; empty where the path would be too long for one."

    binary: str

    @property
    def url(self) -> str:
        """The server's TCP address, the one redis-cli is told."""
        return f"redis://127.0.0.1:{self.port}/0"


class Server:
    """A Redis to use: the one given, one that lives in the directory already, or one started here.

    1. Nothing happens before `with`, `async with` or `start()`.
    2. Under the directory's lock it joins a live server or starts one and writes `redis.json`.
    3. The next server in the same directory has the same data and, if it is still free, the same port.
    4. Leaving stops what this object started, unless it `outlives`; `stop()` stops it in any case.
    5. A parent that is killed takes its server with it (Linux), unless it `outlives`.

    Start it on a thread that lasts: the kernel ends the server when the *thread* that started it ends.
    """

    def __init__(
        self,
        *,
        given_url: str = "",
        directory: Path | None = None,
        binary: Path | None = None,
        outlives: bool = False,
    ) -> None:
        """Decide where; start nothing.

        Args:
            given_url: a Redis to use as it is; nothing is started or stopped then.
            directory: where its data, socket, log and run file live; default `state_directory()/redis`.
            binary: the server to run; default what `binary.find` finds.
            outlives: leave it running when this object or this process ends.
        """
        self._given_url = given_url
        self._directory = directory or state_directory(os.environ) / "redis"
        self._binary = binary
        self._outlives = outlives
        self._running: RunFile | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return self._given_url or self._run.url

    @property
    def unix_url(self) -> str:
        """Its unix socket; the TCP address where it has none."""
        if self._given_url or not self._run.socket:
            return self.url
        return f"unix://{self._run.socket}?db=0"

    @property
    def pid(self) -> int | None:
        """The server's process; None for a given one."""
        return None if self._given_url else self._run.pid

    @property
    def binary(self) -> str:
        """The program that runs; empty for a given server."""
        return "" if self._given_url else self._run.binary

    @property
    def was_started_here(self) -> bool:
        """Whether this object started it, so that leaving ends it."""
        return self._child is not None

    @property
    def has_ended(self) -> bool:
        """Whether what this object started is gone though nobody asked it to end; `start()` brings it back."""
        return self._child is not None and self._child.poll() is not None

    @property
    def _run(self) -> RunFile:
        if self._running is None:
            raise RuntimeError("the private redis has not been started; use `with Server(...)`")
        return self._running

    def start(self) -> Self:
        """Join or start the server and return when it answers."""
        if not self._given_url:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(self._directory / "lock"):
                self._running = live(self._directory) or self._started()
        return self

    def stop(self) -> None:
        """End the server, whoever started it, and return when it is gone. A given one is left alone."""
        running, self._running = self._running, None
        if running is None:
            return
        child, self._child = self._child, None
        with _locked(self._directory / "lock"):
            if child is not None:
                _end(child)
            elif live(self._directory) == running:
                os.kill(running.pid, signal.SIGTERM)
                _await(lambda: _process_id(running.url) is None, STOP_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.was_started_here and not self._outlives:
            self.stop()

    async def __aenter__(self) -> Self:
        # On the loop's own thread, which lasts (see the class); it blocks once, at the very start.
        return self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def _started(self) -> RunFile:
        program = self._binary or binary.find(os.environ)
        before = _run_file(self._directory)
        for attempt in range(PORT_TRIES):
            port = _free_port(before.port if before and attempt == 0 else 0)
            running = self._spawn(program, port)
            if running is not None:
                run_file = self._directory / "redis.json"
                run_file.write_bytes(msgspec.json.encode(running))
                return running
        raise StreamError(
            f"{program} did not start in {PORT_TRIES} tries: {_last_words(self._log)}"
        )

    @property
    def _log(self) -> Path:
        return self._directory / "redis.log"

    def _spawn(self, program: Path, port: int) -> RunFile | None:
        """One try; None when the server ended before it answered."""
        unix_socket = str(self._directory.resolve() / "redis.sock")
        if len(unix_socket.encode()) > SOCKET_PATH_BYTES:
            unix_socket = ""
        tie = 0 if self._outlives or sys.platform != "linux" else os.getpid()
        flags = _flags(self._directory, port, unix_socket)
        with self._log.open("ab") as log:
            child = subprocess.Popen(  # noqa: S603  the binary is the operator's or our own
                [sys.executable, "-ISc", _EXEC, str(tie), str(program), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        running = RunFile(pid=child.pid, port=port, socket=unix_socket, binary=str(program))
        try:
            _await(
                lambda: child.poll() is not None or _process_id(running.url) == child.pid, READY_S
            )
        except BaseException:
            _end(child)
            raise
        if child.returncode is not None:
            return None
        self._child = child
        return running


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where Headgate keeps what outlives a run: `$XDG_STATE_HOME/headgate`."""
    home = (
        environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or Path.home()) / ".local/state"
    )
    return Path(home) / "headgate"


def live(directory: Path) -> RunFile | None:
    """The server that runs in this directory, if one answers and is the one the run file names."""
    running = _run_file(directory)
    return running if running and _process_id(running.url) == running.pid else None


def known_url(redis: RedisSettings) -> str:
    """The Redis that the settings name, with its login, else the private one that runs; none is started.

    Raises:
        StreamError: none is named and none runs.
    """
    if redis.url:
        return redis.login_url
    state = state_directory(os.environ)
    for directory in (state / "redis", _announced(state)):
        running = live(directory)
        if running is not None:
            return running.url
    raise StreamError(
        f"no redis: none is given (--redis, HEADGATE_REDIS_URL) and none runs in {state}"
    )


def announce(directory: Path) -> None:
    """Note where commands that are given no Redis find this directory's, as long as it runs.

    Only a convenience: without a home directory to write in, every command must be given the URL.
    """
    state = state_directory(os.environ)
    with contextlib.suppress(OSError):
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = state / f"{ANNOUNCED}.{os.getpid()}"
        beside.write_text(str(directory.resolve()))
        beside.replace(state / ANNOUNCED)


def _announced(state: Path) -> Path:
    """The directory announced last; one that does not exist where there was none."""
    try:
        return Path((state / ANNOUNCED).read_text())
    except OSError:
        return state / ANNOUNCED


def _flags(directory: Path, port: int, unix_socket: str) -> list[str]:
    """Durable within a second of a power cut, loopback only, and nothing is ever evicted."""
    words = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(directory.resolve()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "protected-mode": "yes",
        "daemonize": "no",
    }
    if unix_socket:
        words |= {"unixsocket": unix_socket, "unixsocketperm": "700"}
    return [part for name, value in words.items() for part in (f"--{name}", value)]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_file(directory: Path) -> RunFile | None:
    try:
        return msgspec.json.decode((directory / "redis.json").read_bytes(), type=RunFile)
    except (FileNotFoundError, *UNREADABLE):
        return None


def _free_port(preferred: int) -> int:
    """The preferred port if nobody listens there, else one that the kernel picks."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise StreamError("no free port on 127.0.0.1")


def _process_id(url: str) -> int | None:
    """The process that answers at this address; None while nothing does, or while it still loads."""
    try:
        with Connection(url, timeout_s=KNOCK_S) as connection:
            if isinstance(connection.call("PING"), Failure):
                return None
            said = connection.call("INFO", "server")
    except StreamError:
        return None
    found = re.search(rb"process_id:(\d+)", said) if isinstance(said, bytes) else None
    return int(found[1]) if found else None


def _await(is_so: Callable[[], bool], limit_s: float) -> None:
    give_up_at = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > give_up_at:
            raise StreamError(f"the private redis took longer than {limit_s:g} s")
        time.sleep(POLL_S)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return " / ".join(lines[-3:]) or "it said nothing"
