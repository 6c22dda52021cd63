"""`headgate submit`: one request by hand."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dispatcher.cli import leader_watch, output
from dispatcher.client import Client, Completion, Handle
from dispatcher.client import prompt as prompts
from dispatcher.client.completion import completion
from dispatcher.client.wishes import Wishes
from scheduler.errors import SettingsError
from scheduler.settings import Settings

app = typer.Typer()


@app.command()
async def submit(
    settings: Settings,
    prompt: Annotated[str | None, typer.Argument(help="The user's message.")] = None,
    *,
    model: Annotated[str, typer.Option(help="Which model; else the body's own.")] = "",
    body: Annotated[str, typer.Option(metavar="FILE", help="An OpenAI body; - is stdin.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; with a prompt only.")
    ] = None,
    request_id: Annotated[
        str, typer.Option("--id", help="Sent once under this id; else one is made.")
    ] = "",
    objective: Annotated[str, typer.Option(help="A promise by its name in the settings.")] = "",
    ttft_s: Annotated[
        float | None, typer.Option(help="Promise: seconds to the first token.")
    ] = None,
    tpot_s: Annotated[float | None, typer.Option(help="Promise: seconds a further token.")] = None,
    deadline_s: Annotated[
        float | None,
        typer.Option(help="Promise: seconds to the whole answer; past it, it expires."),
    ] = None,
    priority: Annotated[
        int | None, typer.Option(help="Higher first; negative may be shed. Default 0.")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Whose it is, for fairness.")] = "",
    session: Annotated[str, typer.Option(help="Requests of one session share prefixes.")] = "",
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    wait: Annotated[bool, typer.Option(help="--no-wait prints the id and leaves.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The terminal record.")] = False,
) -> None:
    """Send one request and print its answer.

    For instance: headgate submit 'Why is the sky blue?' --model llama --ttft-s 0.5 --stream
    """
    wishes = Wishes(
        objective=objective,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        deadline_s=deadline_s,
        priority=priority,
        tenant=tenant,
        session=session,
    )
    if model:
        wishes["model"] = model
    if request_id:
        wishes["id"] = request_id
    if stream:
        wishes["stream"] = True
    content = _body(prompt, body, max_tokens, limit=settings.limits.body_bytes)
    async with Client.from_settings(settings) as client:
        handle = await client.submit(content, **wishes)
        if not wait:
            typer.echo(handle.id)
        else:
            try:
                async with leader_watch.telling(client):
                    await _tell(handle, is_stream=stream, as_json=as_json)
            except (asyncio.CancelledError, BrokenPipeError):
                output.talk(f"{handle.id} goes on: headgate status ID, headgate cancel ID")
                raise


async def _tell(handle: Handle, *, is_stream: bool, as_json: bool) -> None:
    if is_stream and not as_json:
        async for text in handle:
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    record = await handle.record()
    if as_json:
        output.json_line(output.record(record))
    answer = completion(record)
    if not as_json:
        if not is_stream:
            typer.echo(answer.text)
        output.talk(_summary(answer))


def _summary(answer: Completion) -> str:
    record = answer.record
    kept = {True: ", on time", False: ", late", None: ""}[record.on_time]
    return (
        f"{answer.id}: {record.outcome} on {record.endpoint}, first token after "
        f"{output.seconds(record.ttft_s)}, {record.output_tokens} tokens{kept}"
    )


def _body(prompt: str | None, path: str, max_tokens: int | None, *, limit: int) -> bytes:
    if (prompt is None) == (not path):
        raise SettingsError("a prompt or --body FILE is wanted, exactly one of them")
    if prompt is None:
        if max_tokens is not None:
            raise SettingsError("--max-tokens goes with a prompt, wanted it inside the body")
        return _read(path, limit)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return prompts.encoded(body)


def _read(path: str, limit: int) -> bytes:
    try:
        with sys.stdin.buffer if path == "-" else Path(path).open("rb") as file:
            content = file.read(limit + 1)  # a pipe need not end
    except OSError as error:
        raise SettingsError(f"body {path!r} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise SettingsError(f"body {path!r} is over {limit} bytes, which is limits.body_bytes")
    return content
