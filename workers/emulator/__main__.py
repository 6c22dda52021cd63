"""`python -m workers.emulator` is `headgate emulate`, without the root command line."""

import sys

import typer
import uvloop

from scheduler.errors import HeadgateError
from workers.cli import app


def main() -> None:
    try:
        uvloop.run(app(["emulate", *sys.argv[1:]], standalone_mode=False))
    except HeadgateError as error:
        typer.echo(f"headgate: {error}", err=True)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
