"""`headgate explain`: one request's life in order, with why it went where it went."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.table import Table

from dispatcher.cli import output
from dispatcher.cli.output import seconds
from dispatcher.client import Client
from dispatcher.client.standing import Standing
from dispatcher.streams.pages import pages
from scheduler import codec, forecast
from scheduler.errors import UnknownRequestError
from scheduler.settings import Settings
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Result, Reward

app = typer.Typer()

M = TypeVar("M", bound=msgspec.Struct)

AFTER_END_MS = 1_000
"So long after its terminal record the logs are still searched; its reward is written right behind it."

CANDIDATES_SHOWN = 6


class Line(msgspec.Struct, frozen=True, order=True):
    """One thing that happened."""

    at: float
    what: str
    detail: str


class Story(msgspec.Struct, frozen=True):
    """All that the logs know of a request."""

    id: str
    state: str
    enqueued_at: float
    decisions: list[Decision]
    rewards: list[Reward]
    result: Result | None


@app.command()
async def explain(
    settings: Settings,
    request_id: Annotated[str, typer.Argument(metavar="ID", help="Of the request.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="The logs' own words.")] = False,
) -> None:
    """Tell a request's life: when, where and why there; predicted and real."""
    async with Client.from_settings(settings) as client:
        story = await told(client, request_id)
    if as_json:
        fields = {name: getattr(story, name) for name in story.__struct_fields__}
        result = None if story.result is None else output.record(story.result)
        output.json_line(fields | {"result": result})
        return
    table = Table("after", "what", "", box=None, show_header=False)
    for line in sorted(lines(story)):
        table.add_row(f"+{seconds(line.at - story.enqueued_at)}", line.what, line.detail)
    console = output.console()
    console.print(f"{story.id}: {story.result.outcome if story.result else story.state}")
    console.print(table)


async def told(client: Client, request_id: str) -> Story:
    """What the logs say.

    Raises:
        UnknownRequestError: they know nothing.
    """
    standing = await client.status(request_id)
    decisions, rewards = await asyncio.gather(
        _of(client, client.keys.decisions, standing, Decision),
        _of(client, client.keys.rewards, standing, Reward),
    )
    result = None
    if standing.state == "terminal":
        with contextlib.suppress(UnknownRequestError):
            result = await (await client.attach(request_id)).record()
    return Story(request_id, standing.state, standing.enqueued_at, decisions, rewards, result)


async def _of(client: Client, stream: str, standing: Standing, kind: type[M]) -> list[M]:
    """This request's entries of a log: from its enqueue to its end, or to now."""
    wanted = standing.id.encode()
    since, until = standing.entry.partition("-")[0] or "-", "+"
    if standing.result_entry:
        until = str(int(standing.result_entry.partition("-")[0]) + AFTER_END_MS)
    found: list[M] = []
    async for page in pages(client.connection, stream, since, until):
        found += [codec.decode(kind, fields) for _, fields in page if fields.get(b"id") == wanted]
    return found


def lines(story: Story) -> Iterator[Line]:
    """The story's turns, not yet in order."""
    yield Line(story.enqueued_at, "enqueued", "its promises count from here")
    for decision in story.decisions:
        yield _decided(decision, story.enqueued_at)
    for reward in story.rewards:
        yield from _served(reward)
    if story.result is not None and story.result.finished_at is not None:
        yield Line(story.result.finished_at, story.result.outcome, _ended(story.result))


def _decided(decision: Decision, enqueued_at: float) -> Line:
    at = decision.at if decision.at is not None else enqueued_at
    if decision.kind != "assigned":
        slack = "" if decision.slack_s is None else f", slack {seconds(decision.slack_s)}"
        where = f"from {decision.endpoint}: " if decision.endpoint else ""
        return Line(at, decision.kind.replace("_", " "), f"{where}{decision.reason}{slack}")
    parts = [
        f"to {decision.endpoint}, attempt {decision.attempt}",
        f"predicted wait {seconds(decision.start_s)}, prefill {seconds(decision.prefill_s)}",
    ]
    if decision.slack_s is not None:
        parts.append(f"slack {seconds(decision.slack_s)}")
    if decision.best_cached_tokens:
        best = decision.best_cached_tokens
        where = "" if decision.cached_tokens >= best else f", {best} where most are"
        parts.append(f"{decision.cached_tokens} tokens believed cached{where}")
    parts += [f"{decision.waiting} waited", decision.reason]
    text = "; ".join(part for part in parts if part)
    others = decision.candidates[:CANDIDATES_SHOWN]
    if others:
        more = len(decision.candidates) - len(others)
        text += "\ncandidates, seconds to first token: " + ", ".join(others)
        text += f" and {more} more" if more > 0 else ""
    return Line(at, "assigned", text)


def _served(reward: Reward) -> Iterator[Line]:
    if reward.pulled_at is not None:
        yield Line(reward.pulled_at, "pulled", f"by the worker of {reward.endpoint}")
    if reward.admitted_at is not None:
        queued = "" if reward.queue_s is None else f"; {seconds(reward.queue_s)} in its own queue"
        yield Line(reward.admitted_at, "admitted", f"sent to the engine{queued}")
    if reward.first_token_at is not None and reward.decided_at is not None:
        real_s = reward.first_token_at - reward.decided_at
        text = f"{seconds(real_s)} after the decision, predicted {seconds(reward.predicted_s)}"
        text += _bounds(reward)
        work = "KV fetched and joined in" if reward.leg == "decode" else "prefill"
        text += f"; {work} {seconds(reward.prefill_s)}"
        if reward.cached_tokens is not None:
            text += f"; {reward.cached_tokens} of {reward.prompt_tokens} prompt tokens cached"
        done = "prompt done" if reward.leg == "prefill" else "first token"
        yield Line(reward.first_token_at, done, text)
    if reward.outcome == "returned" and reward.finished_at is not None:
        yield Line(reward.finished_at, "returned", reward.reason)


def _bounds(reward: Reward) -> str:
    """The quantiles that were said when it was handed over; empty where none were."""
    ratios = forecast.ratios(reward.features)
    if not ratios or reward.predicted_s is None:
        return ""
    half_s, nine_s = (ratio * reward.predicted_s for ratio in ratios)
    return f" (half within {seconds(half_s)}, nine in ten within {seconds(nine_s)})"


def _ended(result: Result) -> str:
    parts = [result.reason] if result.reason else []
    if result.endpoint:
        parts.append(f"by {result.endpoint}, attempt {result.attempt}")
    if result.ttft_s is not None:
        parts.append(f"first token after {seconds(result.ttft_s)}")
    if result.tpot_s is not None:
        parts.append(f"{seconds(result.tpot_s)} a token, {result.output_tokens} tokens")
    if result.on_time is not None:
        parts.append("on time" if result.on_time else "late")
    return "; ".join(parts)
