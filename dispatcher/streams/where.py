"""Where a Redis is and how redis-py reaches it: one server, TLS, a unix socket, Sentinel or a Cluster."""

import os
import ssl
from pathlib import Path
from typing import Any, Self
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec
import redis.asyncio as aioredis
import redis.exceptions
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from scheduler.settings import RedisSettings

REPLY_TIMEOUT_S = 5.0
"The longest wait for an answer that does not block on the server."

CALLS_MAX = 16
"Connections for calls; more calls at once wait their turn, which a server with one thread makes them do anyway."

READS_MAX = 1024
"Connections for reads that wait on the server: one for each read under way."

OPTIONS = ("db", "ssl_cert_reqs", "ssl_check_hostname")
"What a URL of one server may say behind its `?`, in redis-py's words; all else has a setting, or is ours to say."


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a Redis: all that `connect` needs."""

    url: str
    """`redis://`, `rediss://` (TLS), `unix://`; `redis+sentinel://host:port,host:port/<master>/<db>`;
    `redis+cluster://host:port,host:port` (`rediss+` for either with TLS)."""

    username: str | None = None
    "The ACL user; the URL's where None."

    password: str | None = None
    "Never logged; the URL's where None."

    tls_ca_file: str | None = None
    "CA bundle for TLS; the system's where None."

    tls_cert_file: str | None = None
    "Our own certificate, for a server that wants one; it goes with a key."

    tls_key_file: str | None = None

    @classmethod
    def of(cls, redis: RedisSettings, *, url: str) -> Self:
        """This URL, which may hold its own login, with the certificates of the settings."""
        return cls(
            url=url,
            tls_ca_file=redis.tls_ca_file or None,
            tls_cert_file=redis.tls_cert_file or None,
            tls_key_file=redis.tls_key_file or None,
        )


def client(where: Where, *, is_reader: bool = False) -> Any:
    """A client for the URL; the reader's waits without a timeout and never repeats."""
    url = urlsplit(where.url)
    retry = _again(0) if is_reader else _again(3)
    options: dict[str, Any] = {
        "socket_timeout": None if is_reader else REPLY_TIMEOUT_S,
        "socket_connect_timeout": REPLY_TIMEOUT_S,
        "retry": retry,
        "health_check_interval": 0,
        "max_connections": READS_MAX,
    }
    if where.username is not None:
        options["username"] = where.username
    if where.password is not None:
        options["password"] = where.password
    is_secure = url.scheme.startswith("rediss")
    if is_secure:
        _check_files(where)
        files = {
            "ssl_ca_certs": where.tls_ca_file,
            "ssl_certfile": where.tls_cert_file,
            "ssl_keyfile": where.tls_key_file,
        }
        options |= {name: file for name, file in files.items() if file is not None}
    kind = url.scheme.removeprefix("rediss").removeprefix("redis")
    if kind in ("+sentinel", "+cluster"):
        several = _sentinel if kind == "+sentinel" else _cluster
        return several(url.netloc, url.path, options | ({"ssl": True} if is_secure else {}))
    if url.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(
            f"scheme is {url.scheme!r}, wanted redis, rediss, unix, redis+sentinel or redis+cluster"
        )
    _check(url)
    if is_reader:
        return aioredis.Redis.from_url(where.url, **options)
    pool = aioredis.BlockingConnectionPool.from_url(
        where.url, timeout=REPLY_TIMEOUT_S, **options | {"max_connections": CALLS_MAX}
    )
    return aioredis.Redis.from_pool(pool)


def _again(times: int) -> Retry:
    """After a lost connection; who did not answer in time is not asked again: whoever waits has waited enough."""
    backoff = ExponentialBackoff(cap=0.5, base=0.02)
    return Retry(backoff, times, supported_errors=(redis.exceptions.ConnectionError,))


def _check_files(where: Where) -> None:
    """OpenSSL does not say which of them it misses."""
    for name in ("tls_ca_file", "tls_cert_file", "tls_key_file"):
        path = getattr(where, name)
        try:
            Path(path or os.devnull).open("rb").close()
        except OSError as error:
            raise ValueError(f"redis.{name} {path!r} cannot be read: {error.strerror}") from None
    context, ca, own = ssl.create_default_context(), where.tls_ca_file, where.tls_cert_file
    try:
        if ca is not None:
            context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ValueError(f"redis.tls_ca_file {ca!r} holds no certificate: {error.reason}") from None
    try:
        if own is not None:
            context.load_cert_chain(own, where.tls_key_file)
    except ssl.SSLError as error:
        raise ValueError(
            f"redis.tls_cert_file {own!r} does not go with redis.tls_key_file {where.tls_key_file!r}: {error.reason}"
        ) from None


def _check(url: SplitResult) -> None:
    """What redis-py would pass over in silence, or stumble on once it connects."""
    db = url.path.strip("/")
    if url.scheme != "unix" and db and not db.isdecimal():
        raise ValueError(f"its database is {db!r}, wanted a number")
    for name, _ in parse_qsl(url.query, keep_blank_values=True):
        if name not in OPTIONS:
            raise ValueError(f"its option is {name!r}, wanted one of {', '.join(OPTIONS)}")


def _cluster(netloc: str, _path: str, options: dict[str, Any]) -> Any:
    auth, hosts = _hosts(netloc)
    nodes = [ClusterNode(host, port) for host, port in hosts]
    return RedisCluster(startup_nodes=nodes, **(auth | options))


def _sentinel(netloc: str, path: str, options: dict[str, Any]) -> Any:
    auth, hosts = _hosts(netloc)
    name, _, db = path.strip("/").partition("/")
    if not name:
        raise ValueError("it names no master: wanted redis+sentinel://host:port/<master>[/<db>]")
    watch = {
        "socket_timeout": REPLY_TIMEOUT_S,
        "socket_connect_timeout": REPLY_TIMEOUT_S,
        # A connection that lay idle may be gone; for a sentinel that is dead there are others.
        "retry": _again(1),
    }
    sentinel: Any = Sentinel  # redis-py leaves it untyped
    return sentinel(hosts, sentinel_kwargs=watch).master_for(
        name, db=int(db or 0), **(auth | options)
    )


def _hosts(netloc: str) -> tuple[dict[str, str], list[tuple[str, int]]]:
    """User and password, and the hosts, of `user:password@host:port,host:port`."""
    login, _, rest = netloc.rpartition("@")
    user, _, password = login.partition(":")
    said = (("username", user), ("password", password))
    auth = {key: unquote(word) for key, word in said if word}
    hosts = []
    for part in rest.split(","):
        host, _, port = part.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"host is {part!r}, wanted host:port")
        hosts.append((host.strip("[]"), int(port)))
    return auth, hosts


def without_password(url: str) -> str:
    """The URL as it may be shown.

    >>> without_password("redis://me:secret@h:6379/0")
    'redis://me:***@h:6379/0'
    """
    parts = urlsplit(url)
    login, at, rest = parts.netloc.rpartition("@")
    user, colon, _ = login.partition(":")
    return parts._replace(netloc=f"{user}{colon}{'***' if colon else ''}{at}{rest}").geturl()
