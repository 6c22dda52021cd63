"""Moments inside every process of a system, for hops.py: Python imports a module of this name by itself.

`perf_counter` is one clock for all processes of a machine. Each keeps its moments until its end, then writes them to
a file of its own in $HEADGATE_STAMPS.
"""

import atexit
import functools
import os
from pathlib import Path
from time import perf_counter

MOMENTS = []


def noting(cls, method, name):
    """Let a method note when it is entered, under what `name` makes of its arguments, if anything."""
    original = getattr(cls, method)

    @functools.wraps(original)
    def noted(self, *args, **more):
        said = name(*args)
        if said:
            MOMENTS.append((perf_counter(), said))
        return original(self, *args, **more)

    setattr(cls, method, noted)


def function(commands, *_):
    """The function of ours that a batch begins with."""
    first = commands[0] if commands else ("",)
    return f"calls {first[1].partition('_')[2]}" if first[0] == "FCALL" else ""


def install():
    """In every role alike: what a role has not, it never enters."""
    from dispatcher.client.follower import Following  # noqa: PLC0415  only where it is wanted
    from dispatcher.door.answer import Stream  # noqa: PLC0415
    from dispatcher.door.server import Door  # noqa: PLC0415
    from dispatcher.loop import Loop  # noqa: PLC0415
    from dispatcher.streams.pipe import Pipe  # noqa: PLC0415
    from workers.emulator.answer import Answer  # noqa: PLC0415
    from workers.emulator.server import Emulator  # noqa: PLC0415
    from workers.endpoint import Endpoint  # noqa: PLC0415
    from workers.posts import _Connection  # noqa: PLC0415
    from workers.serving import Serving  # noqa: PLC0415

    noting(Door, "_generate", lambda _: "door: request")
    noting(Pipe, "begin", function)
    noting(Loop, "_turn", lambda read: "dispatcher: turn" if read else "")
    noting(Endpoint, "_came", lambda: "worker: job")
    noting(_Connection, "post", lambda *_: "worker: posts")
    noting(Emulator, "_generate", lambda *_: "engine: request")
    noting(Answer, "_write", lambda _: "engine: writes")
    noting(Serving, "_heard", lambda _: "worker: token")
    noting(Following, "put", lambda entries: "door: token" if b"text" in entries[0][1] else "")
    noting(Stream, "_write", lambda _: "door: writes")


def dump():
    """One line a moment."""
    lines = (f"{at} {said}\n" for at, said in MOMENTS)
    Path(os.environ["HEADGATE_STAMPS"], str(os.getpid())).write_text("".join(lines))


if os.environ.get("HEADGATE_STAMPS"):
    install()
    atexit.register(dump)
