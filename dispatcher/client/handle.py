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
            StreamError: Redis has lost pieces that were not read before; the terminal record has the whole answer.
        """
        stream = self._client.keys.tokens(self.id)
        follower = self._client.follower
        following = follower.follow(stream, after, is_last=_is_last)
        self._ended.tell(following.news.set)
        try:
            while True:
                for entry in following.take():
                    tokens = await self._read(entry, after)
                    after = entry[0]
                    if tokens.text or tokens.chunks:
                        yield Piece(after, tokens.text, tokens.chunks)
                    if tokens.end:
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
                    yield Piece(after, "")
        finally:
            follower.stop(following)
        # The record and the log's end are written in one move, so what is there now is all there will be.
        for entry in await follower.rest(stream, after):
            tokens = await self._read(entry, after)
            after = entry[0]
            if tokens.text or tokens.chunks:
                yield Piece(after, tokens.text, tokens.chunks)

    async def _read(self, entry: Entry, after: str) -> Tokens:
        """This entry of the log, read behind another: who read what was lost before it has no gap."""
        tokens = codec.decode(Tokens, entry[1])
        if tokens.lost:
            stream = self._client.keys.tokens(self.id)
            redis = self._client.connection
            if after == BEGINNING or await redis.entries(stream, after, after):
                raise StreamError(
                    f"redis at {redis.shown} has lost {tokens.lost} pieces of request {self.id!r} before entry {entry[0]}"
                )
        return tokens

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


def _is_last(fields: Mapping[bytes, bytes]) -> bool:
    return bool(fields.get(b"end"))
