"""`headgate status`: the pool, or one request, at a glance."""

import asyncio
import contextlib
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from dispatcher import glance
from dispatcher.cli import output
from dispatcher.cli.output import seconds
from dispatcher.client import Client, Standing
from dispatcher.glance import EndpointGlance, PoolGlance
from scheduler.settings import Settings
from scheduler.wire.worker import Beat

app = typer.Typer()

WATCH_S = 1.0
"Between two looks with --watch."


@app.command()
async def status(
    settings: Settings,
    request_id: Annotated[str, typer.Argument(metavar="[ID]", help="One request only.")] = "",
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line a look.")] = False,
) -> None:
    """The pool at one glance, or where one request stands."""
    async with Client.from_settings(settings) as client:
        with contextlib.ExitStack() as stack:
            live, console = None, output.console()
            if watch and not as_json and console.is_terminal:
                live = stack.enter_context(Live(console=console, auto_refresh=False))
            while True:
                shown = await _look(client, request_id, as_json=as_json)
                if live is not None and shown is not None:
                    live.update(shown, refresh=True)
                elif shown is not None:
                    console.print(shown)
                if not watch:
                    return
                await asyncio.sleep(WATCH_S)


async def _look(client: Client, request_id: str, *, as_json: bool) -> RenderableType | None:
    found: Standing | PoolGlance
    if request_id:
        found = await client.status(request_id)
        shown = _standing(found, client.connection.now())
    else:
        found = await glance.pool(client.connection, client.keys)
        shown = _pool(client.keys.pool, found)
    if as_json:
        output.json_line(found)
        return None
    return shown


def _standing(found: Standing, now: float) -> RenderableType:
    table = Table(show_header=False, box=None)
    table.add_row("id", found.id)
    table.add_row("state", found.state + (", to be cancelled" if found.is_cancelled else ""))
    if found.outcome:
        table.add_row("outcome", found.outcome)
    table.add_row("enqueued", f"{seconds(now - found.enqueued_at)} ago")
    if found.attempt:
        leg = "" if found.leg == "whole" else f", {found.leg} leg"
        table.add_row("attempt", f"{found.attempt} on {found.endpoint or '-'}{leg}")
    return table


def _pool(name: str, found: PoolGlance) -> RenderableType:
    leader = f"{found.leader} (epoch {found.leader_epoch})" if found.leader else "nobody"
    between = f", {found.prefilled} between two legs" if found.prefilled else ""
    table = Table(show_header=False, box=None)
    table.add_row("pool", f"{name}, led by {leader}")
    table.add_row(
        "requests",
        f"{found.unread} unread, {found.waiting} waiting ({found.set_aside} set aside{between}), "
        f"{found.assigned} assigned ({found.running} running)",
    )
    backlog = "unknown: nothing completes" if found.backlog_s is None else seconds(found.backlog_s)
    table.add_row("oldest", f"{seconds(found.oldest_s)}; backlog {backlog}")
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in found.outcomes.items())
    table.add_row("lately", f"{outcomes or 'nothing ended'}; {found.completed_per_s:.1f}/s")
    if found.within_q90 is not None:
        table.add_row(
            "predictions",
            f"{share(found.within_q50)} of first tokens within the median, "
            f"{share(found.within_q90)} within the 90 % bound",
        )
    prior = [one for one in found.endpoints if one.believed == "prior"]
    if prior:
        names = ", ".join(f"{one.beat.endpoint} ({one.switches} switches)" for one in prior)
        table.add_row("guard", f"{names}: declared hardware believed, what was learned is worse")
    if found.drained:
        table.add_row("drained", f"{', '.join(found.drained)}; headgate resume NAME ends it")
    table.add_row("dead", str(found.dead))
    return Group(table, endpoints(found.endpoints), *engines(found.endpoints))


def engines(found: list[EndpointGlance]) -> list[str]:
    """Which engines stand there and what they can do besides, a line for all that are alike."""
    alike: dict[str, list[str]] = {}
    for one in found:
        version = f"vLLM {one.beat.engine}" if one.beat.engine else "an engine of unknown version"
        extras = ", ".join(one.beat.features).replace("_", " ") or "nothing besides"
        alike.setdefault(f"{version}: {extras}", []).append(one.beat.endpoint)
    return [f"{', '.join(names)}  {what}" for what, names in alike.items()]


def endpoints(found: list[EndpointGlance]) -> Table:
    """A row an endpoint."""
    has_roles = any(one.beat.link_gbps for one in found)
    head = ("endpoint", *(("role",) if has_roles else ()), "hardware", "state", "beat", "jobs")
    head += ("running", "queued", "seats", "kv")
    table = Table(*head, "step", "speed", "believed", "off by", "in q90", "on time", box=None)
    for one in found:
        beat = one.beat
        state: str = beat.state if one.is_alive else "silent"
        if one.is_drained:
            state = "drained" if state == "ready" else f"{state}, drained"
        table.add_row(
            beat.endpoint,
            *((role(beat),) if has_roles else ()),
            beat.hardware or "-",
            state + (f": {beat.reason}" if beat.reason else ""),
            seconds(one.silent_s),
            str(one.jobs),
            str(beat.running),
            str(beat.queued + beat.held),
            str(beat.max_num_seqs),
            f"{beat.kv_usage:.0%}",
            seconds(beat.step_s) if beat.step_s else "-",
            "-" if one.speed is None else f"{one.speed:.2f}x",
            one.believed or "-",
            share(one.prediction_error),
            share(one.within_q90),
            share(one.on_time),
        )
    return table


def role(beat: Beat) -> str:
    """Which legs of requests it takes; without a link whole ones, whatever its roles."""
    return "+".join(beat.roles) if beat.link_gbps else "whole"


def share(value: float | None) -> str:
    """A share as a percentage; `-` where unknown."""
    return "-" if value is None else f"{value:.0%}"
