"""`headgate fleet`: real vLLM servers on an emulated clock, for whoever wants to see scheduling on the real thing."""

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from scheduler.errors import SettingsError

if TYPE_CHECKING:
    from workers.fleet.fleet import Fleet
    from workers.fleet.pod import Pod, PodSettings

app = typer.Typer(no_args_is_help=True)

Directory = Annotated[
    Path | None, typer.Option(help="Models, logs and who runs; else in the user's cache.")
]


@app.command(context_settings={"allow_extra_args": True})
def up(
    context: typer.Context,
    count: Annotated[int, typer.Argument(metavar="N", min=0, help="Servers on emulated clocks.")],
    *,
    profiles: Annotated[str, typer.Option(metavar="A,B,...", help="Their GPUs, in turn.")] = "a100",
    compute: Annotated[int, typer.Option(min=0, help="More that really compute a tiny model.")] = 0,
    venv: Annotated[Path, typer.Option(help="The environment with the CPU build of vLLM.")] = Path(
        ".venv-vllm"
    ),
    directory: Directory = None,
    model: Annotated[str, typer.Option(help="Name to serve under.")] = "emulated",
    time_scale: Annotated[float, typer.Option(help="Times faster than the wall clock.")] = 1.0,
    jitter: Annotated[float, typer.Option(help="Spread of the profiles' coefficients.")] = 0.0,
    step_noise: Annotated[float, typer.Option(help="Sigma of each step's log-normal.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of jitter and noise.")] = 0,
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's: most requests in a batch.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="vLLM's: most tokens in a step.")
    ] = 2048,
    block_size: Annotated[int, typer.Option(help="vLLM's: tokens of a KV block.")] = 32,
    kv_tokens: Annotated[int, typer.Option(help="0: the profile's.")] = 0,
    max_model_len: Annotated[int, typer.Option(help="vLLM's: longest context in tokens.")] = 32_768,
    kv_events: Annotated[
        bool, typer.Option("--kv-events", help="Publish what caches hold.")
    ] = False,
    shutdown_timeout: Annotated[int, typer.Option(help="Seconds after SIGTERM.")] = 0,
    stay: Annotated[bool, typer.Option("--stay", help="Until Ctrl-C, and end them then.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line when all answer.")] = False,
) -> Coroutine[object, object, None]:
    """Start N vLLM servers whose forward pass takes the time of a modelled GPU.

    Two start at a time; it returns when all answer, and they run until `headgate fleet down`. What follows `--` goes
    to every `vllm serve`.
    """
    from workers.fleet.pod import PodSettings  # noqa: PLC0415

    place = directory or default_directory()
    try:
        settings = msgspec.convert(
            {
                "venv": venv,
                "directory": place,
                "model": model,
                "time_scale": time_scale,
                "jitter": jitter,
                "step_noise": step_noise,
                "seed": seed,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
                "block_size": block_size,
                "kv_tokens": kv_tokens,
                "max_model_len": max_model_len,
                "shutdown_timeout_s": shutdown_timeout,
                "kv_events": kv_events,
                "more": tuple(context.args),
                "is_tied": stay,
            },
            PodSettings,
        )
    except msgspec.ValidationError as error:
        raise SettingsError(str(error)) from error
    hardware = [*in_turn(count, profiles), *[""] * compute]
    if not hardware:
        raise SettingsError("N is 0, wanted at least one server, here or with --compute")
    return _up(settings, hardware, stays=stay, as_json=as_json)


@app.command()
def down(directory: Directory = None) -> Coroutine[object, object, None]:
    """End the servers, and every process of theirs."""
    return _down(_fleet(directory))


@app.command()
def status(
    directory: Directory = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One line.")] = False,
) -> None:
    """Who runs where."""
    fleet = _fleet(directory)
    rows = [(one, "running" if one.is_running else "gone") for one in fleet.found]
    if as_json:
        _say([{"state": state, **msgspec.structs.asdict(one)} for one, state in rows])
        return
    for one, state in rows:
        typer.echo(f"{one.name}  {one.url}  pid {one.pid}  {state}  {one.log}")


def in_turn(count: int, profiles: str) -> list[str]:
    """So many profiles, taken in turn.

    >>> in_turn(3, "h100,a30")
    ['h100', 'a30', 'h100']
    """
    names = [name.strip() for name in profiles.split(",") if name.strip()]
    if count and not names:
        raise SettingsError("--profiles is empty, wanted at least one")
    return [names[n % len(names)] for n in range(count)]


def default_directory() -> Path:
    """In the user's cache, as the XDG specification has it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "headgate" / "fleet"


def _fleet(directory: Path | None) -> "Fleet":
    # aiohttp and numpy cost half a second, which the other commands of this floor need not wait for.
    from workers.fleet.fleet import Fleet  # noqa: PLC0415

    return Fleet(directory or default_directory())


async def _up(settings: "PodSettings", hardware: list[str], *, stays: bool, as_json: bool) -> None:
    fleet = _fleet(settings.directory)
    told = asyncio.Event()
    began = time.monotonic()
    starting = asyncio.ensure_future(fleet.up(settings, hardware))
    ending = asyncio.ensure_future(told.wait())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await asyncio.wait([starting, ending], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise typer.Exit(1)
    pods = starting.result()
    _greet(pods, time.monotonic() - began, as_json=as_json)
    if stays:
        await told.wait()
        await fleet.down()
    ending.cancel()


def _greet(pods: "list[Pod]", took_s: float, *, as_json: bool) -> None:
    if as_json:
        _say({"endpoints": pods, "took_s": round(took_s, 1)})
        return
    for one in pods:
        typer.echo(f"{one.name}  {one.url}")
    words = " ".join(f"--engine {option(one)}" for one in pods)
    typer.echo(f"try  headgate up {words}")


def option(one: "Pod") -> str:
    """As `headgate up` and `headgate worker` take it."""
    hardware = f",hardware={one.hardware}" if one.hardware else ""
    return f"{one.name}={one.url}{hardware},max_num_seqs={one.max_num_seqs},by_priority=true"


async def _down(fleet: "Fleet") -> None:
    ended = await fleet.down()
    typer.echo(f"ended {', '.join(one.name for one in ended) or 'none'}", err=True)


def _say(value: object) -> None:
    typer.echo(msgspec.json.encode(value).decode())
