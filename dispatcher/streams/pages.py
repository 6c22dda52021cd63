"""A stream of any length, read a page at a time, so that no single reply holds all of it."""

from collections.abc import AsyncIterator

from dispatcher.streams.connection import Connection
from dispatcher.streams.replies import Entry

PAGE = 1000
"Entries in one round trip."


async def pages(
    connection: Connection, stream: str, first: str = "-", last: str = "+"
) -> AsyncIterator[list[Entry]]:
    """Entries from `first` to `last`, both included, oldest first; no page is empty."""
    while page := await connection.entries(stream, first, last, count=PAGE):
        yield page
        if len(page) < PAGE:
            return
        first = f"({page[-1][0]}"


async def whole(connection: Connection, stream: str) -> list[Entry]:
    """All that the stream holds, oldest first."""
    return [entry async for page in pages(connection, stream) for entry in page]
