"""What a read brought, in each of the ways in which servers and redis-py say it."""

from typing import Any

Entry = tuple[str, dict[bytes, bytes]]
"An entry's id and fields."

Read = dict[str, list[Entry]]
"What a read brought, by stream."


def plain(reply: Any) -> Read:
    """A read's reply as the server says it: pairs, and each entry's fields in one list."""
    return {
        str(name, "utf-8"): [
            (str(entry, "ascii"), dict(zip(parts[::2], parts[1::2], strict=True)))
            for entry, parts in rows
            if parts is not None
        ]
        for name, rows in reply or ()
    }


def streams(reply: Any) -> Read:
    """Both shapes of a read's reply: pairs (RESP2) and a map (RESP3)."""
    if not reply:
        return {}
    named = reply.items() if isinstance(reply, dict) else reply
    return {str(name, "utf-8"): entries(rows) for name, rows in named}


def entries(reply: Any) -> list[Entry]:
    """The same of one stream."""
    if (
        reply
        and isinstance(reply[0], list)
        and (not reply[0] or isinstance(reply[0][0], list | tuple))
    ):
        reply = reply[0]  # RESP3 nests a stream's entries once more
    return [(str(entry, "ascii"), fields) for entry, fields in reply if fields is not None]
