"""A request as its client holds it: wait for it, read its tokens, cancel it, ask where it stands."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from typing import TYPE_CHECKING

import msgspec

from dispatcher.client.awaited import Awaited
from dispatcher.client.completion import Completion, completion
from dispatcher.client.standing import Standing
from dispatcher.streams.connection import Entry
from scheduler import codec
from scheduler.errors import StreamError
from scheduler.wire.worker import Result, Tokens

if TYPE_CHECKING:
    from dispatcher.client.client import Client

BEGINNING = "0-0"
"Before the first entry of any stream."


class Piece(msgspec.Struct, frozen=True):
    """One entry of a token log."""

    entry: str
    "Where it lies in the log: give it to `pieces(after=...)` to go on behind it."

    text: str
    "Text since the piece before."

    chunks: str = ""
    "JSON list of the engine's own chunks where they carry more than text."


class Handle:
    """One request.

    1. `await handle` gives its `Completion`, or raises the `OutcomeError` that says how it ended.
    2. `async for text in handle` gives its text as it comes, from the beginning, then raises as above.
    3. It knows its terminal record as soon as the client has read it; nothing is asked of Redis for that.
    """

    def __init__(
        self,
        client: "Client",
        request_id: str,
        ended: Awaited,
        *,
        is_turned_away: bool = False,
    ) -> None:
        self.id = request_id
        self.is_found = False
        "It was there before: sent, perhaps answered, by whoever used this id first."
        self.is_turned_away = is_turned_away
        "It was never enqueued, for there was no room; the same id may be sent again."
        self._client = client
        self._ended = ended

    def __await__(self) -> Generator[object, None, Completion]:
        return self._completion().__await__()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts()

    @property
    def is_done(self) -> bool:
        """Whether its terminal record is here."""
        return self._ended.is_over

    @property
    def known(self) -> Result | None:
        """Its terminal record, if that is here."""
        return self._ended.record

    def when_done(self, tell: Callable[["Handle"], None]) -> None:
        """Call this when its terminal record is here, or will not come."""
        self._ended.tell(lambda: tell(self))

    async def record(self) -> Result:
        """Its terminal record, whatever the outcome.

        Raises:
            StreamError: Redis was away and came back without the request, or the client was closed.
        """
        return await self._ended.wait()

    async def cancel(self, reason: str = "") -> bool:
        """Ask for its end; whether there was still something to end."""
        return await self._client.cancel(self.id, reason=reason)

    async def status(self) -> Standing:
        """Where it stands now."""
        return await self._client.status(self.id)

    async def pieces(
        self, *, after: str = BEGINNING, quiet_s: float | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The token log behind an entry, to its end, as it is written.

        Each piece comes once, also when the request is tried again elsewhere meanwhile. Ends without a raise
        whatever the outcome; a request that does not stream has no pieces. With `quiet_s` an empty piece comes
        whenever nothing was written for so long, for who has to show a sign of life.

        Raises:
            StreamError: Redis has lost pieces that were not read before, or lost what was read and it is said anew,
                perhaps in other words; the terminal record has the whole answer.
        """
        log = _Log(self._client, self.id, after)
        follower = self._client.follower
        following = follower.follow(log.stream, after, is_last=_is_last)
        self._ended.tell(following.news.set)
        try:
            while True:
                for entry in following.take():
                    piece = await log.piece(entry)
                    if piece is not None:
                        yield piece
                    if _is_last(entry[1]):
                        return
                if self._ended.is_over:
                    break
                if quiet_s is None:
                    await following.news.wait()
                    continue
                try:
                    async with asyncio.timeout(quiet_s):
                        await following.news.wait()
                except TimeoutError:
                    yield Piece(log.after, "")
        finally:
            follower.stop(following)
        for entry in await log.rest():
            piece = await log.piece(entry)
            if piece is not None:
                yield piece

    async def _completion(self) -> Completion:
        return completion(await self.record())

    async def _texts(self) -> AsyncIterator[str]:
        has_text = False
        async for piece in self.pieces():
            if piece.text:
                has_text = True
                yield piece.text
        answer = await self
        if not has_text and answer.text:  # it was not asked to stream
            yield answer.text


class _Log:
    """One reading of a token log, of which Redis may have lost some: what was read before, or what was not.

    Who writes goes on from what Redis has, or knows that it had more. So an index goes back only where what was read
    last is lost and is said anew, and leaps only where something between is lost, or lies before what was read last.
    """

    def __init__(self, client: "Client", request_id: str, after: str) -> None:
        self._follower, self._redis = client.follower, client.connection.shown
        self._request_id, self.stream = request_id, client.keys.tokens(request_id)
        self.after = after
        "The last entry that was read."
        self._last: Tokens | None = None
        "What it says; None: nothing was read, or not by us."

    async def piece(self, entry: Entry) -> Piece | None:
        """The next entry's text; None: it has none, or none that was not read before.

        Raises:
            StreamError: something is missing before it, or it does not follow what was read.
        """
        tokens = codec.decode(Tokens, entry[1])
        if self._last is None and self.after != BEGINNING:
            self._last = await self._at(self.after)
            if self._last is None and not tokens.lost and not _is_bad_end(tokens):
                raise self._said_anew(entry)
        is_repeated, last, due = False, self._last, self._due
        if last is not None and tokens.index < (due or last.index + 1):
            # Its reply was lost as well as the entry: whoever wrote it says the same once more.
            is_repeated = _is_same(tokens, last)
            if not is_repeated and not _is_bad_end(tokens):
                raise self._said_anew(entry)
        elif due is not None and tokens.index > due:
            raise self._missing(entry, tokens.index - due, is_lost=tokens.lost > 0)
        elif tokens.lost and last is not None and tokens.attempt != last.attempt:
            raise self._missing(
                entry, tokens.lost
            )  # nobody knows whether it goes on from what was read
        self.after, self._last = entry[0], tokens
        if is_repeated or not (tokens.text or tokens.chunks):
            return None
        return Piece(self.after, tokens.text, tokens.chunks)

    async def rest(self) -> list[Entry]:
        """All that there will be: the request's record and the log's end are written in one move.

        Raises:
            StreamError: what was read last is lost, and what followed it lies before its place.
        """
        rest = await self._follower.entries(self.stream, f"({self.after}")
        if rest or self.after == BEGINNING or await self._at(self.after) is not None:
            return rest
        there = await self._follower.entries(self.stream, "-")
        if there and not _is_bad_end(codec.decode(Tokens, there[-1][1])):
            raise StreamError(
                f"redis at {self._redis} has lost entry {self.after} of request {self._request_id!r} and its clock went "
                "back: the record has the whole answer"
            )
        return []

    @property
    def _due(self) -> int | None:
        """The index of what must come next; None: nobody says how much was read."""
        if self._last is None:
            return 0 if self.after == BEGINNING else None
        return self._last.index + self._last.pieces if self._last.pieces else None

    async def _at(self, entry_id: str) -> Tokens | None:
        for _, fields in await self._follower.entries(self.stream, entry_id, entry_id):
            return codec.decode(Tokens, fields)
        return None

    def _missing(self, entry: Entry, pieces: int, *, is_lost: bool = True) -> StreamError:
        what = f"{pieces} pieces of request {self._request_id!r} before entry {entry[0]}"
        if is_lost:
            return StreamError(f"redis at {self._redis} has lost {what}")
        return StreamError(
            f"redis at {self._redis} has lost what was read and its clock went back: {what} lie before that; the record "
            "has the whole answer"
        )

    def _said_anew(self, entry: Entry) -> StreamError:
        return StreamError(
            f"redis at {self._redis} has lost pieces of request {self._request_id!r} that were read already, and entry "
            f"{entry[0]} says them anew: its record has the whole answer"
        )


def _is_same(tokens: Tokens, last: Tokens) -> bool:
    return (tokens.index, tokens.text, tokens.chunks) == (last.index, last.text, last.chunks)


def _is_bad_end(tokens: Tokens) -> bool:
    """Whether it ends without an answer, so that nothing has to follow what was read."""
    return tokens.end not in ("", "completed")


def _is_last(fields: Mapping[bytes, bytes]) -> bool:
    return bool(fields.get(b"end"))
