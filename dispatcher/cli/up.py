"""`headgate up`: everything on one machine, each role a process of its own."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dispatcher.cli import output
from dispatcher.local import announce, state_directory
from dispatcher.stack import PROFILES, ROLES, Engine, Running, Stack, Wanted
from scheduler.errors import SettingsError
from scheduler.settings import Settings

app = typer.Typer()


@app.command()
async def up(
    settings: Settings,
    *,
    emulate: Annotated[int, typer.Option(metavar="N", min=0, help="Emulated engines.")] = 0,
    profiles: Annotated[
        str, typer.Option(metavar="A,B,...", help="Their hardware, in turn.")
    ] = ",".join(PROFILES),
    roles: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Their roles, in turn: prefill, decode, both. Empty: all serve whole requests.",
        ),
    ] = "",
    link_gbps: Annotated[
        float, typer.Option(help="Emulated: the link that KV goes over, with --roles.")
    ] = Wanted().link_gbps,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL[,SETTING=VALUE]", help="A real vLLM; repeatable."),
    ] = None,
    model: Annotated[str, typer.Option(help="What the emulated engines serve.")] = "emulated",
    time_scale: Annotated[float, typer.Option(help="Emulated: times faster.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the emulated engines.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    door_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the HTTP door; 0: a free one.")
    ] = 0,
    drain_s: Annotated[float, typer.Option(min=0, help="For running requests at the end.")] = 5.0,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Logs and private Redis; else a lasting one, or with emulated engines alone a temporary one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line when all is ready.")] = False,
) -> None:
    """Run everything on this machine: Redis, dispatcher, workers, emulated engines."""
    wanted = Wanted(
        engines=tuple(_engine(one) for one in engine or ()),
        profiles=fleet(emulate, profiles),
        roles=_roles(emulate, roles, has_others=bool(engine)),
        link_gbps=link_gbps,
        model=model,
        time_scale=time_scale,
        seed=seed,
        workers=workers,
        drain_s=drain_s,
        door_port=door_port,
    )
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    with tempfile.TemporaryDirectory(prefix="headgate-") as scratch:
        kept = directory or (state_directory(os.environ) if engine else Path(scratch))
        async with Stack(settings, wanted, directory=kept, told=output.talk) as stack:
            if not settings.redis.url:
                announce(kept / "redis")
            if as_json:
                output.json_line(stack.running)
            else:
                _greet(stack.running)
            watching = asyncio.create_task(stack.watch())
            ending = asyncio.create_task(told.wait())
            await asyncio.wait([watching, ending], return_when=asyncio.FIRST_COMPLETED)
            output.talk("draining")
            for task in (watching, ending):
                task.cancel()
            await asyncio.gather(watching, ending, return_exceptions=True)


def fleet(count: int, text: str, option: str = "--profiles") -> tuple[str, ...]:
    """So many of what an option names, taken in turn.

    >>> fleet(3, "h100,a30")
    ('h100', 'a30', 'h100')
    """
    names = [name for name in text.replace(",", " ").split() if name]
    if count and not names:
        raise SettingsError(f"{option} is empty, wanted at least one")
    return tuple(names[n % len(names)] for n in range(count))


def _roles(count: int, text: str, *, has_others: bool) -> tuple[str, ...]:
    """Of the emulated engines; `has_others`: there are real ones, which may have any."""
    if not text:
        return ()
    if not count:
        raise SettingsError("--roles are those of emulated engines, wanted --emulate as well")
    found = fleet(count, text, "--roles")
    strange = [role for role in found if role not in ROLES]
    if strange:
        raise SettingsError(f"--roles has {strange[0]!r}, wanted {', '.join(ROLES)}")
    if {*found} == {"prefill"} and not has_others:
        raise SettingsError("--roles has only 'prefill', wanted somebody who decodes")
    return found


def _engine(text: str) -> Engine:
    """One `--engine`; what stands behind the address is the worker's to judge."""
    address, _, more = text.partition(",")
    name, equals, url = address.partition("=")
    if not (name and equals and url):
        raise SettingsError(f"--engine is {text!r}, wanted NAME=URL[,SETTING=VALUE]")
    return Engine(name=name, url=url, more=more)


def _greet(running: Running) -> None:
    typer.echo(f"redis   {running.redis}, pool {running.pool}")
    for one in running.endpoints:
        typer.echo(f"engine  {one.name} {one.url} {one.hardware}".rstrip())
    typer.echo(f"door    {running.door}/v1")
    for role, url in running.metrics.items():
        typer.echo(f"metrics {role} {url}")
    typer.echo(f"logs    {running.logs}")
    first = (running.models or ["MODEL"])[0]
    typer.echo(
        f"try     headgate submit --redis {running.redis} --pool {running.pool} --model {first} hello"
    )
