# ruff: noqa: INP001  a script beside its page
"""Writes WIRE.md from the code that speaks the wire: run `python docs/wire_page.py` after a change there."""

import ast
import inspect
import textwrap
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from scheduler import codec, keys, lifecycle
from scheduler.wire import client, dispatcher, worker
from scheduler.wire.words import Outcome

PAGE = Path(__file__).with_name("WIRE.md")

MESSAGES: tuple[tuple[type[msgspec.Struct], str], ...] = (
    (
        client.Request,
        "Stream `requests`. Clients write it, the dispatcher reads it (group `dispatcher`).",
    ),
    (
        dispatcher.Job,
        "Stream `jobs:<endpoint>`. The dispatcher writes it, that endpoint's worker reads it (group `worker`).",
    ),
    (
        worker.Beat,
        "Stream `beats`, and the hash `endpoint:<endpoint>`. Workers write it, the dispatcher reads it.",
    ),
    (
        worker.Tokens,
        "Stream `tokens:<id>`. The worker writes it, the client reads it from any place.",
    ),
    (worker.Result, "Stream `results`, or the request's `reply_to`. Exactly one a request."),
    (worker.Reward, "Stream `rewards`. The worker writes it, the dispatcher learns from it."),
    (client.Control, "Stream `controls`. People write it, the dispatcher reads it."),
    (
        dispatcher.Decision,
        "Stream `decisions`. The dispatcher writes it; `headgate explain` and replays read it.",
    ),
    (dispatcher.Dead, "Stream `dead`. The entry's own fields follow these."),
)

HEAD = """\
# The wire

What lies in Redis, field by field. This page is made from the code (`python docs/wire_page.py`) and a test fails
when it is stale.

- Every key of a pool begins with `<prefix>:{<pool>}:`, by default `hg:{default}:`. The braces keep a pool in one
  slot of a Redis Cluster.
- Entries are flat fields with text values. Absent is the empty string. What Headgate writes has always all fields in
  the same order; what people write may have any of them in any order. Unknown fields are kept.
- A field's name ends in its unit: `_ms` milliseconds; `_at` unix milliseconds; `_tokens` tokens. Lists are words with
  spaces between. Yes and no are `1` and `0`.
- An entry's id is the time at which Redis took it, in milliseconds: slices by time need no index.

A request by hand:

```
redis-cli XADD 'hg:{default}:requests' '*' model llama body '{"messages":[{"role":"user","content":"hi"}]}' ttft_ms 500
```

Its id is then the entry id. Its terminal record comes on `hg:{default}:results`.
"""

OUTCOMES = {
    "completed": "The answer is in `body`.",
    "expired": "Its deadline passed before it could finish.",
    "rejected": "Admission refused it; `retry_after_ms` says when to come back.",
    "cancelled": "Somebody cancelled it.",
    "failed": "The engines could not answer it within its attempts. Its fields lie in `dead`.",
    "invalid": "It cannot be read, or can never be served as it stands. Its fields lie in `dead`.",
}

_KINDS: dict[object, str] = {
    str: "text",
    bytes: "text",
    int: "whole number",
    bool: "1 or 0",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD, _keys(), _outcomes(), _states()]
    parts += [_message(kind, where) for kind, where in MESSAGES]
    return "\n".join(parts)


def _keys() -> str:
    tree = ast.parse(inspect.getsource(keys.Keys)).body[0]
    assert isinstance(tree, ast.ClassDef)
    example = keys.Keys()
    rows = []
    for method in tree.body:
        if not isinstance(method, ast.FunctionDef) or method.name in {"__post_init__", "root"}:
            continue
        argument = [a.arg for a in method.args.args if a.arg != "self"]
        value = getattr(example, method.name)
        name = value(f"<{argument[0].removeprefix('request_')}>") if argument else value
        rows.append((f"`{name}`", _line(ast.get_docstring(method) or "")))
    return "## Keys\n\n" + _table(("key", "what"), rows)


def _outcomes() -> str:
    words = get_args(Outcome)
    assert set(words) == set(OUTCOMES), "an outcome has no explanation here"
    rows = [(f"`{word}`", OUTCOMES[word]) for word in words]
    return "## Outcomes\n\nHow a request ends, once.\n\n" + _table(("outcome", "what"), rows)


def _states() -> str:
    drawing = (lifecycle.__doc__ or "").split("\n\n")[1]
    return f"## States\n\nIn the hash `request:<id>`, field `state`.\n\n```\n{drawing}\n```\n"


def _message(kind: type[msgspec.Struct], where: str) -> str:
    docs = _field_docs(kind)
    hints = get_type_hints(kind)
    rows = []
    for field in msgspec.structs.fields(kind):
        if field.name == "extra":
            continue
        needed = "needed" if field.required else ""
        name = f"`{codec.wire_name(field.name)}`"
        rows.append((name, _kind(field.name, hints[field.name]), needed, docs[field.name]))
    summary = _line(inspect.getdoc(kind) or "")
    return f"## {kind.__name__}\n\n{summary} {where}\n\n" + _table(
        ("field", "type", "", "what"), rows
    )


def _field_docs(kind: type[msgspec.Struct]) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = _line(text)
    return docs


def _kind(name: str, hint: object) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        return " ".join(f"`{word}`" for word in get_args(hint))
    if hint is float:
        return (
            "milliseconds"
            if name.endswith("_s")
            else "unix ms"
            if name.endswith("at")
            else "number"
        )
    return _KINDS.get(hint, "words")


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
