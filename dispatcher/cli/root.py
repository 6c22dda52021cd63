"""`headgate`: the table of commands, what they share, and the one door their errors leave by.

A command is a module `dispatcher/cli/<name>.py` with a Typer `app`, and a line in `COMMANDS`. Other floors offer
an app through the entry-point group `headgate.commands`; what it holds is read from its source. Either is
imported only when a command of it stands on the command line, so `headgate --help` costs the same however many
there are, whatever they import and whether or not they are broken.

A command that takes a `Settings` parameter is handed the settings, and gains `--config`, `--redis` and
`--pool`, which may stand before the command as well. A command may be `async`.
"""

import asyncio
import contextlib
import errno
import gc
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from msgspec import structs
from typer.core import TyperGroup

from dispatcher import options
from dispatcher.cli.outline import outline
from dispatcher.options import Options
from scheduler.errors import HeadgateError, StreamError
from scheduler.settings import LogSettings, Settings

COMMANDS = {
    "dispatcher": "Dispatch a pool's requests to its endpoints; a second process stands by.",
    "door": "Serve OpenAI's HTTP API on a pool: chat, completions, models.",
    "up": "Run everything on this machine: Redis, dispatcher, workers, emulated engines.",
    "demo": "Play a workload through the whole system on emulated engines.",
    "submit": "Send one request and print its answer.",
    "batch": "Answer a file of requests; run it again and it goes on where it stopped.",
    "status": "The pool at one glance, or where one request stands.",
    "explain": "Tell a request's life: when, where and why there; predicted and real.",
    "cancel": "End requests, wherever they are; the engine hears of it within a heartbeat.",
    "dead": "List, show or requeue what could not be served.",
    "drain": "Give an endpoint no new work and wait until it has none.",
    "resume": "Give a drained endpoint work again.",
    "settings": "Every setting as it stands here, with what it means, as TOML.",
    "trace": "Workloads: get, make, convert and look at them.",
    "simulate": "What would these policies do with this traffic on this fleet?",
    "compare": "Medians, 95 % bootstrap intervals and differences paired by window and seed.",
    "record": "Copy a pool's streams into a recording, to ask later what others would have done.",
    "replay": "The recorded facts through a fresh core: the same commands? Or: under other policies?",
    "cells": "The evaluation's cells: list, run, set in tables.",
    "evaluate": "What another choice of endpoints would have been worth, by the decision log alone.",
    "capacity": "The highest rate that keeps promises, or with --rate the smallest fleet for it.",
    "redis": "Talk to Redis by hand, on machines without redis-cli.",
    "version": "What is installed here.",
}
"Name and line of help of each command of this floor; its module bears its name."

FAULT = 2
"The exit code of every error that is not a bug, the same as for a wrong option."

INTERRUPTED = 130
"The exit code after Ctrl-C, as shells count it."

COLLECT_EVERY = 50_000
"""Objects made between two looks for garbage in cycles, of which there is hardly any: messages are made and dropped.

Python looks after 700 or 2,000, at every living request again and again: 30 of a dispatcher's 200 us a request.
"""

Function = Callable[..., object]

ConfigOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Settings file; else $HEADGATE_CONFIG, else ./headgate.toml."
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="redis://, rediss:// or unix:// address; else a private server."
    ),
]
PoolOption = Annotated[str | None, typer.Option(metavar="NAME", help="The pool to work with.")]

SHARED = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
    for name, option in (("config", ConfigOption), ("redis", RedisOption), ("pool", PoolOption))
]


def main() -> None:
    """The console script. A user's mistake is one line on stderr, never a traceback."""
    try:
        root(sys.argv[1:])(prog_name="headgate")
    except* HeadgateError as group:
        for error in _leaves(group):
            print(f"headgate: {error}", file=sys.stderr)  # noqa: T201  stderr is talk
    except* KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except* OSError as group:
        if not _is_full(group):
            raise
        print("headgate: stdout cannot be written: no space left", file=sys.stderr)  # noqa: T201
        sys.stdout = None  # Python would write what is left once more at its end, and fail aloud
    sys.exit(FAULT)  # reached only past an error: typer exits by itself


class _Root(TyperGroup):
    """Says of a value that is refused what it was: typer says only what was wanted."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # typer's own copy of click
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            # Pydantic's, which typer asks.
            errors: Callable[[], list[dict[str, object]]] = getattr(error.__cause__, "errors", list)
            for one in errors():
                error.message = f"{one['input']!r}. {error.message}"
            raise


def root(words: Sequence[str]) -> typer.Typer:
    """The application, with the commands that these words name imported and the others as lines of help."""
    app = typer.Typer(
        cls=_Root, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    before = Options()

    @app.callback()
    def shared(
        config: ConfigOption = None, redis: RedisOption = None, pool: PoolOption = None
    ) -> None:
        """Durable, learned, deadline-aware dispatch of LLM requests: Redis Streams to vLLM fleets."""
        nonlocal before
        before = Options(config=config, redis=redis, pool=pool)

    def load(own: Options) -> Settings:
        said = own.over(before)
        if said.config:
            # For processes that we start.
            os.environ["HEADGATE_CONFIG"] = str(Path(said.config).resolve())
        return options.settings(said, os.environ)

    def load_found(own: Options) -> Settings:
        return _with_known_redis(load(own))

    is_completing = "_HEADGATE_COMPLETE" in os.environ
    for name, summary in COMMANDS.items():
        if name in words or is_completing:
            _adopt(app, importlib.import_module(f"dispatcher.cli.{name}").app, load)
        else:
            app.command(name, help=summary)(_unnamed)
    for entry in sorted(entry_points(group="headgate.commands")):
        lines = outline(entry.module, entry.attr)
        if lines.keys() & set(words) or is_completing:
            _adopt(app, entry.load(), load_found)
        else:
            for name, summary in lines.items():
                app.command(name, help=summary)(_unnamed)
    return app


def _unnamed() -> None:
    raise AssertionError("a command ran without its name among the words")


def _adopt(app: typer.Typer, other: typer.Typer, load: Callable[[Options], Settings]) -> None:
    _give_settings(other, load)
    app.registered_commands.extend(other.registered_commands)
    app.registered_groups.extend(other.registered_groups)


def _give_settings(app: typer.Typer, load: Callable[[Options], Settings]) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        command.callback = _with_settings(command.callback, load)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _give_settings(group.typer_instance, load)


def _with_settings(function: Function, load: Callable[[Options], Settings]) -> Function:
    """The function as typer should see it: options in place of settings, and never a coroutine."""
    # An application may be built more than once in a process; each dresses the bare function.
    function = getattr(function, "undressed", function)
    parameters = inspect.signature(function, eval_str=True).parameters
    wanted = [name for name, parameter in parameters.items() if parameter.annotation is Settings]
    own = [parameter for name, parameter in parameters.items() if name not in wanted]
    shared = SHARED if wanted else []

    def run(**values: object) -> object:
        said = {parameter.name: values.pop(parameter.name) for parameter in shared}
        if wanted:
            settings = load(Options(**said))  # type: ignore[arg-type]
            _configure_log(settings.log)
            values |= dict.fromkeys(wanted, settings)
        _hear_interrupts()
        result = function(**values)
        return _run_to_end(result) if inspect.iscoroutine(result) else result

    run.undressed = function  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *shared]]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
    return run


def _with_known_redis(settings: Settings) -> Settings:
    """The settings, naming the private server that runs here where they name none: other floors can not look."""
    from dispatcher import local  # noqa: PLC0415  only a command that will connect pays for it

    if settings.redis.url:
        return settings
    with contextlib.suppress(StreamError):
        redis = structs.replace(settings.redis, url=local.known_url(settings.redis))
        return structs.replace(settings, redis=redis)
    return settings


def _configure_log(settings: LogSettings) -> None:
    from dispatcher.cli import log  # noqa: PLC0415  structlog costs what help has no use for

    log.configure(settings)


def _hear_interrupts() -> None:
    """From here on Ctrl-C is the command's own business; see `__main__`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_to_end(coroutine: Coroutine[object, object, object]) -> object:
    gc.set_threshold(COLLECT_EVERY, 10, 10)
    try:
        import uvloop  # noqa: PLC0415  only what runs a loop pays for it
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


def _is_full(group: BaseExceptionGroup[OSError]) -> bool:
    return all(
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        for error in group.exceptions
    )


def _leaves(group: BaseExceptionGroup[HeadgateError]) -> Iterator[HeadgateError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
