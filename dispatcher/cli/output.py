"""How commands speak: results on stdout, talk on stderr, one JSON document a line for machines."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from scheduler.errors import UNREADABLE, SettingsError
from scheduler.wire.worker import Result

PIPE_COLUMNS = 160

_STEERING = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in b"\n\t"
}


class _Console(Console):
    def render_str(self, text: str, **options: object) -> Text:
        return super().render_str(shown(text), **options)  # type: ignore[arg-type]  # as they came


def shown(text: str) -> str:
    r"""What others wrote, with the characters spelled out that would steer the terminal it is shown on.

    >>> shown("\x1b]0;mine\x07")
    '\\x1b]0;mine\\x07'
    """
    return text.translate(_STEERING)


def console() -> Console:
    """For results; plain where stdout is no terminal, and wide enough there that no table is cut.

    Brackets in what people wrote are brackets, never markup.
    """
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    return _Console(highlight=False, markup=False, emoji=False, width=width)


def talk(line: str) -> None:
    """A line for the person, not for the pipe."""
    typer.echo(line, err=True)


def json_line(value: object) -> None:
    """One line of JSON on stdout."""
    typer.echo(msgspec.json.encode(value).decode())


def ready(value: object, file: Path | None) -> None:
    """The line that says a service runs: on stdout, and in a file for whoever waits for one.

    Raises:
        SettingsError: the file cannot be written.
    """
    json_line(value)
    if file is None:
        return
    try:
        file.write_bytes(msgspec.json.encode(value) + b"\n")
    except OSError as error:
        raise SettingsError(
            f"--ready-file is {str(file)!r}, wanted one to write: {error.strerror}"
        ) from None


def record(result: Result) -> dict[str, Any]:
    """A terminal record for machines: its body parsed, moments in unix seconds."""
    fields: dict[str, Any] = {
        name: getattr(result, name) for name in result.__struct_fields__ if name != "body"
    }
    return fields | {"body": body(result)}


def body(result: Result) -> object:
    """The engine's answer, parsed where it is JSON."""
    if not result.body:
        return None
    try:
        return msgspec.json.decode(result.body)
    except UNREADABLE:
        return result.body.decode(errors="replace")


def seconds(value: float | None) -> str:
    """A duration as a person reads it.

    >>> seconds(0.0123), seconds(3.21), seconds(150), seconds(None)
    ('12 ms', '3.2 s', '150 s', '-')
    """
    if value is None:
        return "-"
    if abs(value) < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s" if abs(value) < 100 else f"{value:.0f} s"
