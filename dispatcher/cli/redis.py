"""`headgate redis`: redis-cli for machines that have none.

One command from the words given, or a prompt. Replies are shown as redis-cli shows them: dressed on a
terminal, bare in a pipe.
"""

import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from dispatcher import local
from dispatcher.resp import Address, Connection, Failure, Reply
from scheduler.settings import Settings

app = typer.Typer()

STREAMING = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR"}
"Commands after which the server talks on until we leave."

Show = Callable[[Reply], str]


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def redis(
    settings: Settings,
    words: Annotated[
        list[str] | None, typer.Argument(help="A command; none opens a prompt.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Replies as JSON, one a line.")] = False,
) -> None:
    """Talk to Redis by hand, on machines without redis-cli."""
    show = in_json if as_json else (dressed if sys.stdout.isatty() else bare)
    own = settings.redis
    with Connection(
        local.known_url(own),
        timeout_s=None,
        ca_file=own.tls_ca_file,
        cert_file=own.tls_cert_file,
        key_file=own.tls_key_file,
    ) as connection:
        if words:
            is_good = _ask(connection, words, show)
            raise typer.Exit(0 if is_good else 1)
        if shutil.which("redis-cli"):
            typer.echo(f"the same with redis-cli: {redis_cli_line(connection.address)}", err=True)
        _converse(connection, show)


def redis_cli_line(to: Address) -> str:
    """The redis-cli call that reaches this address; it asks for a password by itself.

    >>> redis_cli_line(Address(host="127.0.0.1", port=7001, database=2))
    'redis-cli -p 7001 -n 2'
    """
    words = ["redis-cli"]
    if to.path:
        words += ["-s", to.path]
    else:
        words += ["-h", to.host] if to.host not in {"127.0.0.1", "localhost"} else []
        words += ["-p", str(to.port)]
    words += ["-n", str(to.database)] if to.database else []
    words += ["--tls"] if to.is_tls else []
    words += ["--askpass"] if to.password else []
    return shlex.join(words)


def dressed(reply: Reply, indent: int = 0) -> str:
    """A reply as redis-cli shows it on a terminal.

    >>> print(dressed([b"a", [1, None], []]))
    1) "a"
    2) 1) (integer) 1
       2) (nil)
    3) (empty array)
    """
    if isinstance(reply, list):
        width = len(str(len(reply)))
        inner = indent + width + 2
        lines = [f"{n:>{width}}) {dressed(item, inner)}" for n, item in enumerate(reply, start=1)]
        return ("\n" + " " * indent).join(lines) or "(empty array)"
    match reply:
        case None:
            return "(nil)"
        case Failure():
            return f"(error) {reply}"
        case int():
            return f"(integer) {reply}"
        case bytes():
            return _quoted(reply)
    return reply


def bare(reply: Reply) -> str:
    """A reply as redis-cli writes it into a pipe: values alone, one a line."""
    match reply:
        case None:
            return ""
        case bytes():
            return reply.decode(errors="surrogateescape")
        case list():
            return "\n".join(bare(item) for item in reply)
    return str(reply)


def in_json(reply: Reply) -> str:
    """A reply as one line of JSON."""
    return json.dumps(reply, default=lambda raw: raw.decode(errors="replace"), ensure_ascii=False)


def _ask(connection: Connection, words: list[str], show: Show) -> bool:
    """Send, print what comes; whether it was no error."""
    reply = connection.call(*words)
    typer.echo(show(reply))
    if words[0].upper() in STREAMING:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                typer.echo(show(connection.receive()))
    return not isinstance(reply, Failure)


def _converse(connection: Connection, show: Show) -> None:
    for line in _lines(f"{connection.address}> "):
        try:
            words = shlex.split(line)
        except ValueError:
            typer.echo("Invalid argument(s)", err=True)
            continue
        if words and words[0].lower() in {"exit", "quit"}:
            return
        if words:
            _ask(connection, words, show)


def _lines(prompt: str) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  gives input() its history and its keys
    with contextlib.suppress(EOFError):
        while True:
            yield input(prompt)


def _quoted(raw: bytes) -> str:
    names = {
        0x22: '\\"',
        0x5C: "\\\\",
        0x0A: "\\n",
        0x0D: "\\r",
        0x09: "\\t",
        0x07: "\\a",
        0x08: "\\b",
    }
    shown = (names.get(b) or (chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}") for b in raw)
    return f'"{"".join(shown)}"'
