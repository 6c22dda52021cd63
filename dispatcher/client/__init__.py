"""The Python client: hand in a request with a promise, forget about it, get the answer exactly once.

    async with Client(redis="redis://localhost:6379", pool="chat") as client:
        handle = await client.submit(
            {"model": "llama", "messages": [{"role": "user", "content": "hi"}]}, ttft_s=0.5
        )
        print((await handle).text)

`BlockingClient` is the same for code without a loop. Light on purpose: redis and msgspec, nothing else.
"""

from dispatcher.client.blocking import BlockingClient as BlockingClient
from dispatcher.client.blocking import BlockingHandle as BlockingHandle
from dispatcher.client.client import Client as Client
from dispatcher.client.completion import Completion as Completion
from dispatcher.client.handle import Handle as Handle
from dispatcher.client.handle import Piece as Piece
from dispatcher.client.standing import Standing as Standing
