"""`headgate batch`: a file of requests to a file of answers; see `dispatcher.batch` for what it promises."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dispatcher import batch as batches
from dispatcher.batch import Batch, Tally
from dispatcher.cli import leader_watch, output
from dispatcher.client import Client
from dispatcher.client.wishes import Wishes
from scheduler.settings import Settings

app = typer.Typer()


@app.command()
async def batch(
    settings: Settings,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="OpenAI Batch lines.")],
    sink: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Appended to.")],
    *,
    errors: Annotated[Path | None, typer.Option(help="Failures go here; else to OUT.")] = None,
    model: Annotated[str, typer.Option(help="For all lines; else each body's own.")] = "",
    objective: Annotated[str, typer.Option(help="A promise by its name in the settings.")] = "",
    deadline_s: Annotated[
        float | None, typer.Option(help="Promise: seconds to each answer.")
    ] = None,
    priority: Annotated[
        int, typer.Option(help="Higher first; negative may be shed.")
    ] = batches.PRIORITY,
    tenant: Annotated[str, typer.Option(help="Whose they are, for fairness.")] = "",
    in_flight: Annotated[
        int, typer.Option(min=1, help="Most requests in Redis at a time.")
    ] = batches.IN_FLIGHT,
    as_json: Annotated[bool, typer.Option("--json", help="The count at the end.")] = False,
) -> None:
    """Answer a file of requests; run it again and it goes on where it stopped."""
    wishes = Wishes(objective=objective, deadline_s=deadline_s, priority=priority, tenant=tenant)
    if model:
        wishes["model"] = model
    work = Batch(source, sink, errors)
    client = Client.from_settings(settings, name=work.client_name)
    with _progress(work) as (told, moved):
        async with client, leader_watch.telling(client, told):
            tally = await work.run(
                client, wishes=wishes, told=told, moved=moved, in_flight=in_flight
            )
    failed = tally.failed + tally.failed_before
    if as_json:
        output.json_line(tally)
    output.talk(
        f"{tally.lines} lines: {tally.done - failed} completed, {failed} failed"
        + (f", {tally.written_before} of them in earlier runs" if tally.written_before else "")
    )
    if failed:
        raise typer.Exit(1)


@contextmanager
def _progress(work: Batch) -> Iterator[tuple[Callable[[str], None], Callable[[Tally], None]]]:
    """A bar on a terminal; elsewhere only the lines that fail."""
    if not sys.stderr.isatty():
        yield output.talk, lambda _: None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=work.tally.lines, failed=0)

        def moved(tally: Tally) -> None:
            bar.update(task, completed=tally.done, failed=tally.failed)

        yield bar.console.print, moved
