"""What a reign reads: new requests, each once, and the logs, each from its own cursor. Two reads wait on the server."""

from collections.abc import Awaitable, Callable, Mapping

from dispatcher.delivery import wait_out
from dispatcher.streams.connection import Came, Connection, Read
from scheduler.errors import StreamError
from scheduler.keys import DISPATCHER_GROUP, Keys

BLOCK_S = 1.0
"How long one read waits on the server; a stop or a changed cursor waits for it at most."


class Reading:
    """The reads of one reign, each a task of its own, as long as that lasts."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        node: str,
        *,
        count: int,
        came: Came,
        queue: Callable[[Read], Awaitable[None]],
    ) -> None:
        """Read for one node.

        Args:
            connection: the Redis.
            keys: the pool's.
            node: our consumer name in the group of `requests`.
            count: entries taken at most by one read.
            came: told of news the moment they are here, before any task has its turn.
            queue: told of the same news by their reader, who asks for more when it returns.
        """
        self._connection = connection
        self._keys = keys
        self._node = node
        self._count = count
        self._came = came
        self._queue = queue

    async def requests(self, last: str) -> None:
        """New entries behind this one, each once; after a failure first what the lost reply may have held."""
        requests, is_sure, tries = self._keys.requests, True, 0
        while True:
            try:
                if is_sure:
                    read = await self._connection.read_group(
                        DISPATCHER_GROUP,
                        self._node,
                        [requests],
                        count=self._count,
                        block_s=BLOCK_S,
                        came=self._came,
                    )
                else:
                    await self._connection.ensure_group(requests, DISPATCHER_GROUP)
                    entries = await self._connection.history(
                        DISPATCHER_GROUP, self._node, requests, after=last, count=self._count
                    )
                    is_sure = not entries
                    read = {requests: entries} if entries else {}
                tries = 0
            except StreamError as error:
                is_sure = False
                tries = await wait_out(str(error), tries)
                continue
            if read:
                last = read[requests][-1][0]
                await self._queue(read)

    async def logs(self, after: Mapping[str, str]) -> None:
        """Rewards, beats and controls, each behind its own entry."""
        cursors, tries = dict(after), 0
        while True:
            try:
                read = await self._connection.read(
                    cursors, count=self._count, block_s=BLOCK_S, came=self._came
                )
                tries = 0
            except StreamError as error:
                tries = await wait_out(str(error), tries)
                continue
            for stream, entries in read.items():
                cursors[stream] = entries[-1][0]
            await self._queue(read)
