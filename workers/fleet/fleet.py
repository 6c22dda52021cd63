"""Several servers: started two at a time, found again by their file, ended with all their children."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from scheduler.errors import EngineError, SettingsError
from workers.fleet import pod
from workers.fleet.pod import Pod, PodSettings

STARTING_MAX = 2
"A start is 15 seconds of one core; more at a time only take longer."

PORTS = 3
"Of a server: its own, and two for KV events, if it publishes them."

READY_S = 240.0
"From a server's start to its first answer; 15 to 30 s on two cores."

KNOCK_S = 0.25
ENDED_S = 10.0
"After SIGTERM and its own shutdown timeout; then it is killed."

KILLED_S = 5.0
"Until the kernel has buried what was killed; a bound, where nobody does."


class Fleet:
    """The servers of one directory.

    1. `up` starts them and returns when all answer; on any failure none is left.
    2. `found` reads them back, in this process or another.
    3. `down` ends them, children included.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "fleet.json"
        self.directory = directory

    @property
    def found(self) -> list[Pod]:
        """Those that were started here and not ended."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=list[Pod])
        except FileNotFoundError:
            return []

    async def up(self, settings: PodSettings, hardware: Sequence[str]) -> list[Pod]:
        """Start one server for each name, an empty one for a server that really computes.

        Raises:
            SettingsError: some run here already, or a setting is wrong.
            EngineError: one did not start; the others were ended again.
        """
        if running := [one.name for one in self.found if one.is_running]:
            raise SettingsError(
                f"{', '.join(running)} run already in {self.directory}; headgate fleet down ends them"
            )
        for name in dict.fromkeys(hardware):
            await asyncio.to_thread(pod.make_model, settings, name)
        places = _named(hardware)
        pods: list[Pod] = []
        starting = asyncio.Semaphore(STARTING_MAX)

        async def one(number: int, name: str, ports: Sequence[int]) -> None:
            async with starting:
                kind = hardware[number]
                begun = pod.start(settings, name=name, hardware=kind, number=number, ports=ports)
                pods.append(begun)
                self._note(pods)
                await answers(begun)

        try:
            async with asyncio.TaskGroup() as tasks:
                ports = free_ports(PORTS * len(places))
                for number, name in enumerate(places):
                    own = ports[PORTS * number : PORTS * (number + 1)]
                    tasks.create_task(one(number, name, own))
        except BaseException as error:
            await end(pods, grace_s=0.0)
            self._note([])
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0] from None
            raise
        pods.sort(key=lambda one: places.index(one.name))
        self._note(pods)
        return pods

    async def down(self) -> list[Pod]:
        """End them; those that were still there."""
        pods = [one for one in self.found if one.is_running]
        await end(pods, grace_s=ENDED_S)
        self._note([])
        return pods

    def _note(self, pods: Sequence[Pod]) -> None:
        if not pods:
            self._file.unlink(missing_ok=True)
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(pods))
        partial.replace(self._file)


async def answers(one: Pod) -> None:
    """Return when the server is healthy.

    Raises:
        EngineError: it ended, or took too long; with the last words of its log.
    """
    began = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        while not await is_healthy(http, one):
            if not one.is_running:
                raise EngineError(f"{one.name} did not start: {one.last_words}")
            if time.monotonic() - began > READY_S:
                raise EngineError(
                    f"{one.name} did not start in {READY_S:g} s, is the machine busy? {one.last_words}"
                )
            await asyncio.sleep(KNOCK_S)


async def is_healthy(http: aiohttp.ClientSession, one: Pod) -> bool:
    """Whether /health says 200; a paused server says so too."""
    try:
        async with http.get(f"{one.url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def end(pods: Sequence[Pod], *, grace_s: float) -> None:
    """SIGTERM, and after the grace SIGKILL to the whole group of each: its engine is a child."""
    for one in pods:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGCONT)  # a frozen one would not hear
            os.kill(one.pid, signal.SIGTERM)
    await _gone(pods, grace_s)
    for one in pods:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
    await _gone(pods, KILLED_S)


async def _gone(pods: Sequence[Pod], limit_s: float) -> None:
    """Return when nothing of any of them is left, or after so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while any(map(_is_there, pods)):  # noqa: ASYNC110  a stranger's end has no event
                await asyncio.sleep(KNOCK_S / 5)


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _named(hardware: Sequence[str]) -> list[str]:
    """a100-0, a100-1, l40s-0, cpu-0.

    >>> _named(["a100", "l40s", "a100", ""])
    ['a100-0', 'l40s-0', 'a100-1', 'cpu-0']
    """
    counts: Counter[str] = Counter()
    names = []
    for kind in hardware:
        names.append(f"{kind or 'cpu'}-{counts[kind]}")
        counts[kind] += 1
    return names


def _is_there(one: Pod) -> bool:
    """Whether anything of its process group is left; our own dead children are buried on the way."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(one.pid, os.WNOHANG)
    try:
        os.killpg(one.pid, 0)
    except ProcessLookupError:
        return False
    return True
