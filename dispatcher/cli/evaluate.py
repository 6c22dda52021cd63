"""`headgate evaluate`: what another choice of endpoints would have been worth, by the decision log alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.table import Table

from dispatcher.cli import download, output, recordings
from dispatcher.client import Client
from dispatcher.streams.pages import whole
from scheduler import codec, evaluate, recording
from scheduler.evaluate import Estimate, Interval
from scheduler.events import Assign
from scheduler.recording import Line
from scheduler.settings import Settings
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Reward

app = typer.Typer()

SUPPORT_LOW, EFFECTIVE_LOW = 0.95, 100
"Below these an estimate is printed with a warning."


@app.command("evaluate")
async def evaluate_(
    settings: Settings,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[RECORDING]", help="Of `loop.journal` or `record`; else the pool."),
    ] = None,
    *,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            metavar="P[,P...]",
            help="Each NAME or NAME:FIELD=VALUE. Names: " + ", ".join(evaluate.TARGETS),
        ),
    ] = "earliest-finish",
    metric: Annotated[
        Literal["ttft_s", "on_time"],
        typer.Option(help="Seconds from the decision to the first token, or the share on time."),
    ] = "ttft_s",
    out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="A list.")] = None,
) -> None:
    """What another choice of endpoints would have been worth, by the decision log alone.

    It needs a log with exploration: what was never tried cannot be estimated.
    """
    targets = [(label.strip(), evaluate.named(label.strip())) for label in policy.split(",")]
    if file is None:
        decisions, rewards = await _logged(settings)
    else:
        with recordings.opened(file) as found:
            decisions, rewards = _recorded(found.lines)
    rows, certain = evaluate.joined(decisions, rewards)
    if certain:
        output.talk(
            f"{certain} of {certain + len(rows)} decisions left nothing to chance and are left out"
        )
    estimates = [
        evaluate.estimate(rows, target, label=label, metric=metric) for label, target in targets
    ]
    if out is not None:
        with download.replacing(out) as written:
            written.write(msgspec.json.format(msgspec.json.encode(estimates), indent=1) + b"\n")
    _show(estimates)


async def _logged(settings: Settings) -> tuple[list[Decision], list[Reward]]:
    async with Client.from_settings(settings) as client:
        decisions = await whole(client.connection, client.keys.decisions)
        rewards = await whole(client.connection, client.keys.rewards)
    return codec.readable(Decision, decisions), codec.readable(Reward, rewards)


def _recorded(lines: Iterable[Line]) -> tuple[list[Decision], list[Reward]]:
    decisions, rewards = [], []
    for line in lines:
        if line.noted is not None:
            decisions.append(line.noted)
        if line.reward is not None:
            rewards.append(line.reward)
        if bytes(line.decided):
            decisions += [
                command.decision
                for command in recording.commands(bytes(line.decided))
                if isinstance(command, Assign)
            ]
    return decisions, rewards


def _show(estimates: list[Estimate]) -> None:
    table = Table("policy", "as logged", "IPS", "SNIPS", "DR", "n", "effective", "support")
    for one in estimates:
        table.add_row(
            one.policy,
            *(_shown(part) for part in (one.logged, one.ips, one.snips, one.dr)),
            str(one.n),
            f"{one.n_effective:.0f}",
            f"{one.support:.0%}",
        )
    output.console().print(table)
    for one in estimates:
        if one.support < SUPPORT_LOW:
            output.talk(
                f"{one.policy}: the log could have made only {one.support:.0%} of its choices; "
                "IPS counts the others as nothing, DR takes the predictor's word for them"
            )
        if one.n_effective < EFFECTIVE_LOW:
            output.talk(f"{one.policy}: worth {one.n_effective:.0f} decisions of its own, few")
        if one.n_cut:
            output.talk(
                f"{one.policy}: {one.n_cut} weights up to {one.weight_max:.0f} were cut to "
                f"{evaluate.WEIGHT_MAX:g}"
            )
    output.talk(
        "not seen by any of these: another policy would have left other queues and caches behind"
    )


def _shown(one: Interval) -> str:
    return f"{one.value:.4g} [{one.low:.4g}, {one.high:.4g}]"
