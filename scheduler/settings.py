"""Every setting, with its default and its reason; `parse` makes them from TOML and the environment.

A setting is a field here and nothing else: its place in the file, its environment variable, its check and
its line in `headgate settings` all follow from the field, its type and the docstring under it.

    [loop]
    read_max = 512          # or HEADGATE_LOOP__READ_MAX=512, which wins

Reading the file is the caller's work: the core touches no disk.
"""

from typing import Annotated, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from msgspec import Meta, Struct

from scheduler.fairness import FairnessSettings
from scheduler.slo import Objective
from scheduler.wire.words import ENDPOINT_PATTERN

LONG_S = 1e9
"Thirty years; what is longer no timer takes."

Seconds = Annotated[float, Meta(gt=0, le=LONG_S)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=LONG_S)]
Count = Annotated[int, Meta(ge=1)]


class RedisSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the log is kept, and who we are there."""

    url: str = ""
    """
    redis://, rediss:// or unix:// address.

    Empty: a private server is started beside us. In the file it may hold no password.
    """

    prefix: str = "hg"
    "What every key begins with, so that several installations can share one Redis."

    username: str = ""
    "The ACL user; empty for Redis's default user."

    password: str = ""
    "The password. From the environment only (HEADGATE_REDIS_PASSWORD); refused in the file."

    password_file: str = ""
    "A file that holds the password and nothing else, as Kubernetes and Docker mount secrets."

    tls_ca_file: str = ""
    "The certificate authority for rediss://; empty for the system's."

    tls_cert_file: str = ""
    "Our own certificate, for a server that wants one of its clients (tls-auth-clients)."

    tls_key_file: str = ""
    "That certificate's private key."

    def __post_init__(self) -> None:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("one of tls_cert_file and tls_key_file is empty, wanted both or none")

    @property
    def login_url(self) -> str:
        """The URL with the username and password in it: for connecting, never for printing."""
        if not (self.username or self.password):
            return self.url
        return _with_login(self.url, quote(self.username, safe=""), quote(self.password, safe=""))

    @property
    def shown_url(self) -> str:
        """The URL as it may be printed: a password in it is `***`."""
        parts = urlsplit(self.url)
        if parts.password is None:
            return self.url
        return _with_login(self.url, parts.username or "", "***")

    def __repr__(self) -> str:
        return f"RedisSettings(url={self.shown_url!r}, prefix={self.prefix!r})"


class LoopSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of the dispatcher: read all, receive all, decide once, send, acknowledge."""

    read_max: Count = 256
    """
    Entries taken from Redis in one step.

    More amortises the round trip; fewer decides sooner. 256 entries decode in well under a millisecond.
    """

    step_s: Seconds = 0.1
    "The longest a step waits for news; a turn comes at least this often, so lost wake-ups cost no more."

    snapshot_every_s: Seconds = 5.0
    "How often the learnt state is saved for a warm start; a crash re-reads at most this much of the log."

    retention_s: SecondsOrNone = 3600.0
    "How long finished entries stay readable for replay and explanation."

    journal: str = ""
    """
    A directory where every reign records what its core was told and decided, for `headgate replay`; empty: none.

    It holds no bodies. Some 4 KB and a seventh of the core's own time a request; the newest 8 files of a pool are kept.
    """

    journal_bytes: Count = 2**30
    "How long a file of the journal may grow; the reign goes on in the next."


class LeaseSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How soon silence counts as death. Shorter recovers sooner and mistakes a pause for a death sooner."""

    leader_s: Seconds = 3.0
    "A leader that has not renewed for this long is replaced; it renews three times in it."

    worker_s: Seconds = 3.0
    "A worker that has sent no beat for this long loses its jobs to others."

    kv_s: Seconds = 20.0
    """
    How long a prompt's KV is relied on that was computed for another endpoint to decode.

    Well below the engines' own lease (vLLM's `kv_lease_duration`, 30 s): after it they answer from whatever lies there.
    """

    beat_s: Seconds = 1.0
    "How often a worker says that it lives; at most half of `worker_s`, so one lost beat is forgiven."

    def __post_init__(self) -> None:
        if self.beat_s > self.worker_s / 2:
            raise ValueError(
                f"beat_s is {self.beat_s:g}, wanted at most half of worker_s ({self.worker_s:g})"
            )


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one pool takes in before it says no."""

    body_bytes: Count = 16 * 2**20
    "The longest body accepted: a million tokens of text, or a few images."

    inline_bytes: Annotated[int, Meta(ge=0)] = 1024
    """
    A longer body rides as a claim check in a key of its own and never passes through the dispatcher.

    Redis packs small entries tightly.
    """

    body_ttl_s: Seconds = 86400.0
    "How long a claim-checked body is kept once nobody waits for it, or while no dispatcher leads."

    waiting_max: Count = 100_000
    """
    Requests waiting in a pool; one more is rejected with a time to come back.

    Who that is, the dispatcher says: one of a priority below 0 makes room for others, and with `[fairness]` the last of the
    tenant with the longest line. So that it is asked, clients refuse by themselves only at a tenth more.
    """

    @property
    def queued_max(self) -> int:
        """Requests waiting at which a client refuses by itself, whoever asks: nobody may be reading."""
        return self.waiting_max + self.waiting_max // 10


class EngineAddress(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vLLM and what its worker should say of it; what is left out is asked of the engine."""

    name: str
    "The endpoint's name in the pool."

    url: str
    "Where it listens, such as http://127.0.0.1:8000."

    hardware: str = ""
    "Its class for the cost prior, such as a100; empty: learned from scratch."

    roles: tuple[Literal["both", "prefill", "decode", "encode"], ...] = ("both",)
    """
    What legs of a request it takes.

    One whose only role is `prefill` computes prompts for those that decode, all others serve whole requests as well.
    """

    link_gbps: Annotated[float, Meta(ge=0)] = 0.0
    """
    Gigabits a second over which it hands KV to other engines, or fetches it; 0: it does neither.

    The engine must have been started with --kv-transfer-config: docs/PD.md.
    """

    kv_token_bytes: Annotated[int, Meta(ge=0)] = 0
    "One token's KV, which a transfer must carry; 0: as of an 8B model in 16 bits, and learned from there."

    models: tuple[str, ...] = ()
    "What it serves; empty: what /v1/models says."

    max_num_seqs: Count = 256
    "The engine's seats, as it was started; no metric tells them."

    max_model_len: Annotated[int, Meta(ge=0)] = 0
    "The longest context it serves; 0: what /v1/models says."

    by_priority: bool = False
    "Whether the engine was started with --scheduling-policy priority; then it is told each request's."

    kv_events: str = ""
    "Where it publishes its KV events, such as tcp://127.0.0.1:5557; empty: as /kv_event_sources says (vLLM 0.31+)."

    kv_replay: str = ""
    "Where past KV events can be asked for, beside `kv_events`; empty: nowhere."

    api_key_file: str = ""
    "A file with the key that the engine was started with (--api-key); empty: none."

    def __post_init__(self) -> None:
        if not ENDPOINT_PATTERN.fullmatch(self.name):
            raise ValueError(
                f"name is {self.name[:60]!r}, wanted 1 to 128 characters, none a space or ="
            )
        if "prefill" in self.roles and len(self.roles) == 1 and not self.link_gbps:
            raise ValueError(
                f"roles of {self.name!r} is only prefill and link_gbps is 0, wanted a link to hand KV over"
            )


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sidecar beside the engines of one machine."""

    name: str = ""
    "What the process calls itself; empty: host and process id."

    engines: tuple[EngineAddress, ...] = ()
    "The engines it stands beside, as [[worker.engines]] tables."

    drain_s: SecondsOrNone = 30.0
    "After SIGTERM, how long running requests may finish before they are handed back."

    connect_s: Seconds = 5.0
    "How long the engine may take to accept a connection or answer a probe before it counts as away."

    first_token_s: Seconds = 120.0
    "An engine silent for so long after it was given a request has lost it."

    gap_s: Seconds = 30.0
    "An engine silent for so long between two tokens has lost the request."

    stall_s: Seconds = 5.0
    "An engine that sends nothing at all for so long, with answers under way, is frozen: they go elsewhere."

    failures_max: Count = 3
    "Requests failing one after the other before the engine counts as away, whatever /health says."

    probe_s: Seconds = 1.0
    "How often the engine's load is read, and an engine that is away is asked again."

    held_max: Count = 1024
    "Jobs taken from Redis and not finished; the rest stay in the stream."

    tokens_s: Seconds = 0.02
    """
    How long tokens may gather before they are written.

    One write carries the tokens of all requests; shorter is smoother, longer costs less of both CPUs.
    """

    news_s: Seconds = 0.02
    "How long news (started, first tokens) may gather before a beat carries it."

    step_s: Seconds | None = None
    """
    The longest decode step wanted, whatever was promised; absent: only promises bound the batch.

    Shorter keeps more promises in overload and makes fewer tokens a second.
    """

    margin: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    "Part of every TPOT promise held back for what the step-time law does not know."

    patience_s: Seconds = 5.0
    "A held job older than this is admitted before all others."

    buffer_bytes: Count = 64 * 2**20
    "Text kept while Redis is away; beyond it the longest answers are given up."

    keep_s: Seconds = 3600.0
    "How long token logs and private results stay readable after the end."

    metrics_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    "Where /metrics, /healthz and /readyz are served; 0: a free port, which the ready line names."

    def __post_init__(self) -> None:
        names = [engine.name for engine in self.engines]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"engines has {min(twice)!r} twice, wanted each name once")


class DoorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenAI-compatible front door."""

    host: str = "127.0.0.1"
    "Where it listens; 0.0.0.0 for every interface. Without API keys whoever reaches it may use it."

    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    "Its port; 0: a free one."

    metrics_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    "Where /metrics, /healthz and /readyz are served beside the door itself; 0: only there."

    api_keys_file: str = ""
    "A file with lines of KEY TENANT; empty: no key is wanted, and clients say themselves who they are."

    api_keys_variable: str = ""
    "An environment variable with the same, separated by commas or line ends."

    tls_cert_file: str = ""
    "The certificate chain for HTTPS; empty: HTTP."

    tls_key_file: str = ""
    "The certificate's private key."

    open_max: Count = 10_000
    "Requests open at once; one more is refused with 503."

    read_s: Seconds = 60.0
    "How long a client may take to send its request: its head, without which it is cut off, and its body."

    write_s: Seconds = 60.0
    "A client that takes nothing of its answer for so long is cut off."

    keepalive_s: SecondsOrNone = 15.0
    """
    A stream that has had nothing to say for so long gets a comment line, and its status with the first: proxies cut
    off who is silent, most after 60 s. 0: never.
    """

    drain_s: SecondsOrNone = 30.0
    "After SIGTERM, how long open requests may finish before they are cancelled."

    def __post_init__(self) -> None:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("one of tls_cert_file and tls_key_file is empty, wanted both or none")


class LogSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said on stderr. stdout carries results only."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    "The least that is said."

    form: Literal["auto", "text", "json"] = "auto"
    "`text` for people, `json` for machines; `auto` is text on a terminal and json elsewhere."


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. `Settings()` is what runs when nothing is set."""

    pool: str = "default"
    "The pool: one set of streams, one leader, one plan."

    redis: RedisSettings = RedisSettings()
    loop: LoopSettings = LoopSettings()
    lease: LeaseSettings = LeaseSettings()
    limits: LimitSettings = LimitSettings()
    worker: WorkerSettings = WorkerSettings()
    door: DoorSettings = DoorSettings()
    log: LogSettings = LogSettings()

    policy: dict[str, object] = {}
    "What decides who goes first, by name, and its own settings."

    plan: dict[str, object] = {}
    "How far the plan looks, how early it binds and what it explores: `commit_window_s`, `fill`, `tie`, `explore`, ..."

    profile: dict[str, object] = {}
    """
    How an endpoint is chosen, where not by the plan itself: tables of fetchers, filters and scorers, and a picker.

    docs/PLUGINS.md lists them.
    """

    objectives: dict[str, Objective] = {}
    "Named promises: [objectives.chat] serves requests that say `objective chat`."

    fairness: FairnessSettings = FairnessSettings()


def _with_login(url: str, username: str, password: str) -> str:
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{username}:{password}@{place}"))
