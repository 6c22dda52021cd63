"""Which commands a module defines, read from its source: importing it may cost a second, and help may not."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def outline(module: str, app: str) -> dict[str, str]:
    """Name and first line of help of each function that the module hands to `app.command`, and of its groups.

    >>> outline("dispatcher.cli.version", "app")
    {'version': 'What is installed here.'}
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            help_text = ast.get_docstring(node) or ""
            for name in _names(node, app):
                found[name] = help_text.partition("\n")[0]
        elif isinstance(node, ast.Expr):
            found |= _group(node.value, app)
    return found


def _group(node: ast.expr, app: str) -> dict[str, str]:
    """Name and help in `app.add_typer(other, name=..., help=...)`."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=owner), attr="add_typer"), keywords=keywords
        ) if owner == app:
            said = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
            return {str(said["name"]): str(said.get("help", ""))} if "name" in said else {}
    return {}


def _names(node: ast.FunctionDef | ast.AsyncFunctionDef, app: str) -> Iterator[str]:
    """The names under which `@app.command(...)` decorators register this function, by typer's rule."""
    for decorator in node.decorator_list:
        match decorator:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr="command"), args=args
            ) if owner == app:
                match args:
                    case [ast.Constant(value=str(name)), *_]:
                        yield name
                    case _:
                        yield node.name.lower().replace("_", "-")
