"""How one real vLLM server is started: its command line, its environment, its model."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from scheduler.errors import EngineError, SettingsError
from scheduler.sim import profile

INSIDE = Path(__file__).with_name("inside")
"What runs in vLLM's own environment."

EMULATED_SHAPE = "nano"
COMPUTING_SHAPE = "tiny"

COMPUTING_MODEL = "tiny"
"What those that really compute serve: another text than the emulated, so a pool must not take one for the other."

COMPUTING_KV_BYTES = 256 * 2**20
COMPUTING_MAX_MODEL_LEN = 8192

LAST_WORDS = 600
"Characters of a log that are shown when a server does not start."

NICE = 5
"Servers are many and the client is one: it shall not starve."

# In a session of its own, so that Ctrl-C reaches us alone; where wanted the kernel ends it with us (Linux).
_LAUNCH = """\
import ctypes, os, signal, sys
parent, nice, *command = sys.argv[1:]
if parent != "0" and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(1)
os.nice(int(nice))
os.execv(command[0], command)
"""


class PodSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the servers of a fleet have in common."""

    venv: Path = Path(".venv-vllm")
    "The environment with the CPU build of vLLM."

    directory: Path
    "Models, logs and caches."

    model: str = "emulated"
    "The name that those on an emulated clock serve."

    time_scale: Annotated[float, Meta(gt=0)] = 1.0
    "Emulated clock: times faster than the wall clock."

    jitter: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    "Spread of the profile's coefficients, as the emulator's."

    step_noise: Annotated[float, Meta(ge=0)] = 0.0
    "Sigma of each step's log-normal."

    seed: int = 0
    "Of jitter and noise; the n-th server takes `seed + n`, as `headgate up` counts."

    max_num_seqs: Annotated[int, Meta(ge=1)] = 256
    max_num_batched_tokens: Annotated[int, Meta(ge=1)] = 2048
    block_size: Annotated[int, Meta(ge=32, multiple_of=32)] = 32
    "Tokens of a KV block; attention on a CPU wants whole multiples of 32."
    kv_tokens: Annotated[int, Meta(ge=0)] = 0
    "Of the KV cache; 0: the profile's own figure."

    max_model_len: Annotated[int, Meta(ge=1)] = 32_768
    "Longest prompt plus output, at most what the KV cache holds."

    shutdown_timeout_s: Annotated[int, Meta(ge=0)] = 0
    "Seconds that running requests get after SIGTERM; 0 aborts them at once."

    kv_events: bool = False
    "Whether they publish what their caches store and forget; each on ports of its own."

    more: tuple[str, ...] = ()
    "Further arguments of `vllm serve`."

    is_tied: bool = False
    "Whether the servers end with the process that started them."


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    name: str
    url: str
    hardware: str
    "Its profile; empty for one that really computes."

    port: int
    pid: int
    max_num_seqs: int
    "Its seats; a worker must be told."

    log: str

    @property
    def is_running(self) -> bool:
        """Whether its process is there, and not merely its number."""
        process = Path(f"/proc/{self.pid}")
        try:
            words = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return not Path("/proc/self").exists() and _exists(self.pid)
        if not words:  # dead and not buried, or just now becoming another program
            return state != "Z"
        return str(self.port).encode() in words.split(b"\0")

    @property
    def last_words(self) -> str:
        """The end of its log."""
        words = Path(self.log).read_text(errors="replace")[-LAST_WORDS:].strip()
        return f"{words or 'it said nothing'} ({self.log})"


def start(
    settings: PodSettings, *, name: str, hardware: str, number: int, ports: Sequence[int]
) -> Pod:
    """Start one server; it will be some 15 seconds before it answers.

    Args:
        settings: what all have in common.
        name: its own.
        hardware: its profile; empty for one that really computes.
        number: which one of the fleet it is.
        ports: its own, then where it publishes KV events and repeats them, if it does.

    Raises:
        SettingsError: there is no vLLM, or no such profile.
    """
    log = settings.directory / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(program(settings, "vllm")), *arguments(settings, hardware, ports)]
    parent = os.getpid() if settings.is_tied else 0
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  our own words and the user's own
            [sys.executable, "-ISc", _LAUNCH, str(parent), str(NICE), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(settings, hardware, number),
            start_new_session=True,
        )
    # It lives on without us; the object would complain of that at its own end.
    process.returncode = 0
    return Pod(
        name=name,
        url=f"http://127.0.0.1:{ports[0]}",
        hardware=hardware,
        port=ports[0],
        pid=process.pid,
        max_num_seqs=settings.max_num_seqs,
        log=str(log),
    )


def arguments(settings: PodSettings, hardware: str, ports: Sequence[int]) -> list[str]:
    """What `vllm` is told; every choice that matters to a comparison is said, none left to its version."""
    if hardware:
        kv_tokens = settings.kv_tokens or profile.load(hardware).kv_tokens
        # vLLM keeps one block for itself.
        kept = kv_tokens + settings.block_size
        kv_bytes = kept * _told(settings, EMULATED_SHAPE)["kv_bytes_per_token"]
        own = ["--worker-cls", "headgate_clock.ClockWorker"]
        max_model_len = min(settings.max_model_len, kv_tokens)
    else:
        kv_bytes, own = COMPUTING_KV_BYTES, []
        max_model_len = min(settings.max_model_len, COMPUTING_MAX_MODEL_LEN)
    options = {
        "host": "127.0.0.1",
        "port": ports[0],
        "served-model-name": settings.model if hardware else COMPUTING_MODEL,
        "dtype": "bfloat16",
        "max-model-len": max_model_len,
        "block-size": settings.block_size,
        "kv-cache-memory-bytes": kv_bytes,
        "max-num-seqs": settings.max_num_seqs,
        "max-num-batched-tokens": settings.max_num_batched_tokens,
        "scheduling-policy": "priority",
        "shutdown-timeout": settings.shutdown_timeout_s,
        "generation-config": "vllm",
        "distributed-executor-backend": "uni",
    }
    if settings.kv_events:
        options["kv-events-config"] = _publishes(*ports[1:])
    flags = (
        "enforce-eager",
        "enable-per-request-metrics",
        "enable-prompt-tokens-details",
        "disable-uvicorn-access-log",
    )
    said = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    model = _model(settings, EMULATED_SHAPE if hardware else COMPUTING_SHAPE)
    return ["serve", str(model), *said, *(f"--{flag}" for flag in flags), *own, *settings.more]


def environment(settings: PodSettings, hardware: str, number: int) -> dict[str, str]:
    """No telemetry, no downloads, one thread, one process fewer."""
    cache = settings.directory / "cache"
    environ = {name: value for name, value in os.environ.items() if not _is_foreign(name)}
    environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # /pause, /sleep, /is_paused, /reset_prefix_cache
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "XDG_CACHE_HOME": str(cache),
    }
    if hardware:
        environ |= {
            "PYTHONPATH": str(INSIDE),
            "HEADGATE_CLOCK": clock(settings, hardware, number),
        }
    return environ


def clock(settings: PodSettings, hardware: str, number: int) -> str:
    """The profile's coefficients for the worker inside vLLM, the same specimen that the emulator would draw."""
    rng = np.random.default_rng(settings.seed + number)
    specimen = profile.load(hardware).jittered(rng, settings.jitter)
    return msgspec.json.encode(
        {
            "coef": specimen.coef,
            "k": specimen.k,
            "extra_ms_per_step": specimen.extra_ms_per_step,
            "time_scale": settings.time_scale,
            "step_noise": settings.step_noise,
            "seed": settings.seed + number,
        }
    ).decode()


def make_model(settings: PodSettings, hardware: str) -> None:
    """Make the model, unless it is there.

    Raises:
        EngineError: it could not be made.
    """
    shape = EMULATED_SHAPE if hardware else COMPUTING_SHAPE
    if (_model(settings, shape) / "headgate.json").exists():
        return
    script = str(INSIDE / "headgate_model.py")
    command = [str(program(settings, "python")), script, shape, str(_model(settings, shape))]
    made = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  as above
    if made.returncode:
        raise EngineError(f"the model {shape!r} could not be made: {made.stderr[-400:].strip()}")


def program(settings: PodSettings, name: str) -> Path:
    """A program of vLLM's environment.

    Raises:
        SettingsError: it is not there.
    """
    found = settings.venv.absolute() / "bin" / name
    if not found.exists():
        raise SettingsError(
            f"--venv is {str(settings.venv)!r}, which has no {name}; deploy/vllm/install.sh makes one"
        )
    return found


def _model(settings: PodSettings, shape: str) -> Path:
    return settings.directory.absolute() / "models" / shape


def _publishes(events: int, replay: int) -> str:
    fields = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events}",
        "replay_endpoint": f"tcp://*:{replay}",
    }
    return msgspec.json.encode(fields).decode()


def _told(settings: PodSettings, shape: str) -> dict[str, int]:
    raw = (_model(settings, shape) / "headgate.json").read_bytes()
    return {"kv_bytes_per_token": msgspec.json.decode(raw)["kv_bytes_per_token"]}


def _is_foreign(name: str) -> bool:
    """Settings of other servers, and Python's own of our environment."""
    return name.startswith(("VLLM_", "PYTHON")) or name == "VIRTUAL_ENV"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
