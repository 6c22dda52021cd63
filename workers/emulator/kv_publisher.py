"""The emulated server's KV events: what its cache stores and forgets, published as vLLM does."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

from workers.emulator.text import TOKEN_BYTES, ids_of

BUFFER_STEPS = 10_000
"Messages kept for who missed them; vLLM's default."

END = (-1).to_bytes(8, "big", signed=True)

_encode = msgspec.msgpack.Encoder().encode


class KvPublisher:
    """PUB for the news, ROUTER for past ones.

    1. `open` binds both, on free ports; `source` is valid from then on.
    2. `stored`, `removed` and `cleared` note what happens in a step.
    3. `flush` sends it as one message with the next number.
    """

    def __init__(self, block_size: int) -> None:
        """Publish blocks of so many tokens."""
        self._block_size = block_size
        self._news: zmq.Socket[bytes]
        self._past: zmq.asyncio.Socket
        self._events: list[dict[str, object]] = []
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=BUFFER_STEPS)
        self._next = 0
        self.source: dict[str, object] = {}
        "As /kv_event_sources shows it."

    def open(self, host: str) -> None:
        """Bind, and answer who asks for the past."""
        self._news = zmq.Context.instance().socket(zmq.PUB)
        self._past = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        for socket in (self._news, self._past):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"tcp://{host}:0")
        self.source = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._news.getsockopt_string(zmq.LAST_ENDPOINT),
            "replay_endpoint": self._past.getsockopt_string(zmq.LAST_ENDPOINT),
            "buffer_steps": BUFFER_STEPS,
            "topic": "",
        }
        self._answering = asyncio.create_task(self._answer())

    def close(self) -> None:
        """Publish no more."""
        self._answering.cancel()
        self._news.close()
        self._past.close()

    def stored(self, keys: Sequence[int], data: bytes, start: int, stop: int) -> None:
        """The blocks `keys[start:stop]` of a text can be found from now on.

        Args:
            keys: of all full blocks of the text.
            data: the text, four bytes a token.
            start: the first block that is new.
            stop: behind the last.
        """
        width = self._block_size * TOKEN_BYTES
        self._events.append(
            {
                "type": "BlockStored",
                "block_hashes": list(keys[start:stop]),
                "parent_block_hash": keys[start - 1] if start else None,
                "token_ids": ids_of(data[start * width : stop * width]),
                "block_size": self._block_size,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            }
        )

    def removed(self, key: int) -> None:
        """This block was given to another text."""
        self._events.append({"type": "BlockRemoved", "block_hashes": [key], "medium": "GPU"})

    def cleared(self) -> None:
        """The whole cache was reset; as in vLLM it is said with the next step."""
        self._events.append({"type": "AllBlocksCleared"})

    def flush(self) -> None:
        """Send what the step has brought."""
        if not self._events:
            return
        payload = _encode([time.time(), self._events, 0])
        self._events = []
        self._sent.append((self._next, payload))
        self._news.send_multipart([b"", self._next.to_bytes(8, "big"), payload])
        self._next += 1

    async def _answer(self) -> None:
        while True:
            client, _, start = await self._past.recv_multipart()
            for seq, payload in list(self._sent):
                if seq >= int.from_bytes(start, "big"):
                    number = seq.to_bytes(8, "big")
                    await self._past.send_multipart([client, b"", b"", number, payload])
            await self._past.send_multipart([client, b"", b"", END, b""])
