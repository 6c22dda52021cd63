"""The commands of the workers' floor; the root command line finds `app` by its entry point."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from scheduler.errors import UNREADABLE, SettingsError
from scheduler.settings import Settings
from scheduler.sim.arguments import EngineSettings
from workers.emulator.settings import EmulatorSettings, KvTransfer
from workers.fleet import cli as fleet

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(fleet.app, name="fleet", help="Real vLLM servers on an emulated GPU's clock.")


@app.callback()
def workers() -> None:
    """Beside an engine."""


@app.command()
def emulate(
    *,
    profile: Annotated[str, typer.Option(help="GPU and model: a100, h100, l40s, ...")] = "a100",
    model: Annotated[str, typer.Option(help="Name to serve under.")] = "emulated",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 0,
    time_scale: Annotated[float, typer.Option(help="Times faster than the wall clock.")] = 1.0,
    max_num_seqs: Annotated[
        int, typer.Option(help="vLLM's: most requests in a batch.")
    ] = EngineSettings().max_num_seqs,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's: most tokens in a step.")] = (
        EngineSettings().max_num_batched_tokens
    ),
    long_prefill_token_threshold: Annotated[
        int, typer.Option(help="vLLM's: most tokens of one prompt in a step; 0: any.")
    ] = 0,
    block_size: Annotated[
        int, typer.Option(help="vLLM's: tokens of a KV block.")
    ] = EngineSettings().block_size,
    kv_tokens: Annotated[int | None, typer.Option(help="Default: the profile's.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="vLLM's: longest context in tokens; default: all KV.")
    ] = None,
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority.")] = "fcfs",
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(help="vLLM's: requests at which it refuses; default: none.")
    ] = None,
    max_num_queued_tokens: Annotated[
        int | None, typer.Option(help="vLLM's: prompt tokens at which it refuses.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of jitter, noise and stalls.")] = 0,
    jitter: Annotated[float, typer.Option(help="Spread of the profile's coefficients.")] = 0.0,
    step_noise: Annotated[float, typer.Option(help="Sigma of each step's log-normal.")] = 0.0,
    stall_probability: Annotated[float, typer.Option(help="Of a stall in a step.")] = 0.0,
    stall_s: Annotated[float, typer.Option(help="How long a stall lasts, in seconds.")] = 0.2,
    slowdown: Annotated[float, typer.Option(help="Factor on every step.")] = 1.0,
    shutdown_timeout: Annotated[float, typer.Option(help="Wall seconds after SIGTERM.")] = 0.0,
    prefix_caching: Annotated[bool, typer.Option(help="Share the KV of equal prefixes.")] = True,
    frontend: Annotated[bool, typer.Option(help="Spend front-end time.")] = True,
    frontend_ms: Annotated[
        float | None, typer.Option(help="How much; default: the profile's.")
    ] = None,
    enable_per_request_metrics: Annotated[
        bool, typer.Option(help="vLLM's: times in the last chunk.")
    ] = False,
    enable_force_include_usage: Annotated[
        bool, typer.Option(help="vLLM's: usage in every stream.")
    ] = False,
    kv_events: Annotated[
        bool, typer.Option(help="Publish what the cache stores and forgets.")
    ] = False,
    kv_transfer_config: Annotated[
        str,
        typer.Option(
            metavar="JSON", help="As vLLM's, for NixlConnector; empty: no KV is handed over."
        ),
    ] = "",
    link_gbps: Annotated[
        float, typer.Option(help="The link that KV goes over.")
    ] = KvTransfer().link_gbps,
    side_channel_host: Annotated[
        str, typer.Option(help="Where other engines find it; default: --host.")
    ] = "",
    allow_faults: Annotated[bool, typer.Option(help="POST /emulator/fault.")] = False,
    ready_file: Annotated[Path | None, typer.Option(help="Written when it serves.")] = None,
) -> Coroutine[object, object, None]:
    """Run an emulated vLLM server.

    Prints one JSON line with its url when it is ready; SIGTERM ends it as it ends vLLM.
    """
    try:
        engine = msgspec.convert(
            {
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
                "long_prefill_token_threshold": long_prefill_token_threshold,
                "block_size": block_size,
                "kv_tokens": kv_tokens,
                "prefix_caching": prefix_caching,
                "scheduling_policy": scheduling_policy,
                "max_num_queued_reqs": max_num_queued_reqs,
                "max_num_queued_tokens": max_num_queued_tokens,
                "step_noise": step_noise,
                "stall_probability": stall_probability,
                "stall_s": stall_s,
            },
            EngineSettings,
        )
        settings = EmulatorSettings(
            profile=profile,
            model=model,
            host=host,
            port=port,
            time_scale=time_scale,
            engine=engine,
            max_model_len=max_model_len,
            seed=seed,
            jitter=jitter,
            slowdown=slowdown,
            frontend=frontend,
            frontend_s=None if frontend_ms is None else frontend_ms / 1e3,
            shutdown_timeout_s=shutdown_timeout,
            enable_per_request_metrics=enable_per_request_metrics,
            enable_force_include_usage=enable_force_include_usage,
            kv_events=kv_events,
            kv_transfer=_kv_transfer(kv_transfer_config, link_gbps, side_channel_host),
            allow_faults=allow_faults,
        )
    except ValueError as error:  # msgspec's too
        raise SettingsError(str(error)) from error
    return _emulate(settings, ready_file)


def _kv_transfer(config: str, link_gbps: float, host: str) -> KvTransfer | None:
    if not config:
        return None
    try:
        said = msgspec.json.decode(config, type=KvTransfer)
    except UNREADABLE as error:
        raise SettingsError(f"--kv-transfer-config is {config!r}: {error}") from None
    return msgspec.structs.replace(said, link_gbps=link_gbps, host=host)


async def _emulate(settings: EmulatorSettings, ready_file: Path | None) -> None:
    from workers.emulator.server import Emulator  # noqa: PLC0415  aiohttp only where it serves

    emulator = Emulator(settings, die=partial(os._exit, 1))  # as after kill -9
    await emulator.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, emulator.terminate)
    ready = msgspec.json.encode(
        {"url": emulator.url, "model": settings.model, "profile": settings.profile}
    ).decode()
    typer.echo(ready)
    if ready_file is not None:
        _write_whole(ready_file, ready)
    await emulator.gone.wait()
    if emulator.exit_code:
        raise typer.Exit(emulator.exit_code)


def _write_whole(path: Path, line: str) -> None:
    """Whoever waits for the file must not read half of it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(f"{line}\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise SettingsError(
            f"--ready-file is {str(path)!r}, wanted one to write: {error.strerror}"
        ) from None


@app.command()
def worker(
    settings: Settings,
    *,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL[,SETTING=VALUE]",
            help="An engine to stand beside, such as a0=http://127.0.0.1:8000,hardware=a100; repeatable.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="What the process calls itself.")] = "",
    drain_s: Annotated[
        float | None, typer.Option(min=0, help="Seconds to finish in after SIGTERM.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="For /metrics, /healthz, /readyz; 0: a free one."),
    ] = None,
) -> Coroutine[object, object, None]:
    """Stand beside one or more vLLM engines: take their jobs from Redis and see each to its end.

    Prints one JSON line when jobs can come; SIGTERM drains it.
    """
    from workers.worker import with_engines  # noqa: PLC0415  aiohttp only where it is used

    said = {"name": name or None, "drain_s": drain_s, "metrics_port": metrics_port}
    given = {key: value for key, value in said.items() if value is not None}
    told = msgspec.structs.replace(
        settings, worker=msgspec.structs.replace(settings.worker, **given)
    )
    return _work(with_engines(told, engine or ()))


async def _work(settings: Settings) -> None:
    from dispatcher.streams.where import without_password  # noqa: PLC0415
    from workers.worker import Worker, serve  # noqa: PLC0415

    def ready(worker: Worker) -> None:
        typer.echo(
            msgspec.json.encode(
                {
                    "worker": worker.name,
                    "pool": settings.pool,
                    "engines": {
                        one.name: without_password(one.url) for one in settings.worker.engines
                    },
                    "metrics_port": worker.metrics_port,
                }
            ).decode()
        )

    await serve(settings, ready)
