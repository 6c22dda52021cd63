"""`headgate replay`: yesterday again, exactly as it was or under other policies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec import structs

from dispatcher import plugins
from dispatcher.cli import download, lab, output, recordings, simulate
from dispatcher.cli.lab import Bench, Cell
from dispatcher.cli.recordings import Recording
from scheduler import recording
from scheduler.errors import SettingsError
from scheduler.sim import recorded, replay, story, workload
from scheduler.sim.replay import Outcome
from scheduler.sim.report import Report

app = typer.Typer()

DIFFERS = 1
"The exit code of a replay that came otherwise."


@app.command("replay")
def replay_(
    file: Annotated[
        Path, typer.Argument(metavar="RECORDING", help="A file of `loop.journal`, or of `record`.")
    ],
    *,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="With a setting changed, as plan.tie=0."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="P[,P...]",
            help="What would these have done? As `simulate --policy`, and `recorded`: its own settings.",
        ),
    ] = None,
    seeds: lab.SeedsOption = 1,
    out: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT", help="With --policy: as `simulate --json`."),
    ] = None,
    jobs: lab.JobsOption = None,
) -> None:
    """The recorded facts through a fresh core: the same commands? Or: under other policies?

    Exits 1 with the first difference.
    """
    with recordings.opened(file) as found:
        if policy is not None:
            if changes:
                raise typer.BadParameter(
                    "--set is for the exact replay; a policy takes NAME:FIELD=VALUE"
                )
            _ask(found, lab.labels(policy), seeds=seeds, out=out, jobs=jobs)
            return
        outcome = _replayed(found, changes or [])
    _say(found, outcome, is_changed=bool(changes))
    if outcome.difference is not None:
        raise typer.Exit(DIFFERS)


def _replayed(found: Recording, changes: list[str]) -> Outcome:
    if found.head.seed is None:
        raise SettingsError(
            f"{found.name} is a copy of the streams, which do not say when the core was told what: "
            "set loop.journal for recordings that can be repeated, or ask with --policy"
        )
    if found.head.part:
        raise SettingsError(
            f"{found.name} is part {found.head.part} of its reign, wanted part 0, which the others follow by "
            "themselves; of this one alone, ask with --policy or `evaluate`"
        )
    settings = recording.settings(found.head, changes, plug_ins=_plug_ins(found))
    return replay.replayed(recordings.whole(found), settings, seed=found.head.seed)


def _plug_ins(found: Recording) -> tuple[plugins.PlugIn, ...]:
    """What the recorded settings name that other packages bring."""
    settings = found.head.settings
    return plugins.chosen(settings.get("policy") or {}, settings.get("profile") or {})


def _say(found: Recording, outcome: Outcome, *, is_changed: bool) -> None:
    told = (
        f"{outcome.facts} facts, {outcome.turns} turns, {outcome.commands} commands "
        f"in {outcome.span_s:.1f} s of pool {found.head.pool}"
    )
    apart = outcome.difference
    if apart is None:
        typer.echo(f"the same: {told}")
        if found.is_cut or not outcome.end:
            output.talk(
                f"{found.name} has no last line: its dispatcher was killed or still writes, or the copy is cut"
            )
        elif outcome.end == "rolled":
            output.talk(f"the reign of {found.name} went on in a part that does not lie beside it")
        return
    whose = f" of request {apart.request}" if apart.request else ""
    typer.echo(f"differs in turn {apart.turn} at {apart.now:.6f}, {apart.field}{whose}")
    typer.echo(f"  recorded: {apart.recorded}")
    typer.echo(f"  replayed: {apart.replayed}")
    output.talk(f"up to there the same: {told}")
    if not is_changed:
        output.talk(
            f"recorded by headgate {found.head.version}: another version may decide otherwise, this one may not"
        )


def _ask(
    found: Recording, names: list[str], *, seeds: int, out: Path | None, jobs: int | None
) -> None:
    """The lab with the recording's arrivals, on a fleet fitted from its rewards."""
    told = story.read(found.lines, is_copy=found.head.seed is None)
    settings = recording.settings(found.head, plug_ins=_plug_ins(found))
    stage = recorded.stage(told, settings, name=Path(found.name).name.split(".")[0])
    stage.check()
    for caution in recorded.cautions(told, stage.machines):
        output.talk(caution)
    rate_rps = workload.rate(stage.work.arrivals)
    if not rate_rps:
        raise SettingsError(
            f"{found.name}: all its requests came at once, wanted some time between"
        )
    with Bench(stage, jobs) as bench:
        bounds = bench.bounds([(seed, rate_rps) for seed in range(seeds)])
        reports = bench.cells(
            [Cell(name, seed, rate_rps, None) for name in names for seed in range(seeds)]
        )
    reports = [
        structs.replace(
            one,
            ttft_mean_bound_s=bounds[one.seed].ttft_mean_s,
            on_time_bound=bounds[one.seed].on_time,
        )
        for one in reports
    ]
    if out is not None:
        with download.replacing(out) as file:
            file.write(msgspec.json.format(msgspec.json.encode(reports), indent=1) + b"\n")
    simulate.show(reports)
    for line in _cancelled(reports):
        output.console().print(line)
    was = recorded.served(told)
    shown = "-" if was.ttft_mean_s is None else f"{was.ttft_mean_s:.3f}"
    late = "-" if was.ttft_p99_s is None else f"{was.ttft_p99_s:.3f}"
    output.console().print(
        f"as it was: {was.n_completed} of {was.n} completed, {was.n_cancelled} cancelled, {was.on_time:.1%} on time, "
        f"TTFT mean {shown} s, P99 {late} s, hit {was.cache_hit:.1%}"
    )


def _cancelled(reports: list[Report]) -> Iterator[str]:
    """What of each policy's requests was taken away before it had ended, the mean over its seeds."""
    for name in dict.fromkeys(one.policy for one in reports):
        own = [one for one in reports if one.policy == name]
        count = sum(one.n_cancelled for one in own) / len(own)
        if count:
            yield f"{name}: {count:.3g} of {own[0].n} cancelled, and in no other figure"
