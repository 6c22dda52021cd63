"""An engine that is played byte by byte: what it says to each post, and behind which page, is the test's."""

import asyncio
import contextlib

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWER = (
    b'data: {"choices":[{"text":"hi","finish_reason":"stop"}],"usage":{"completion_tokens":1}}\n\n'
    b"data: [DONE]\n\n"
)


def page(body, status=200):
    """A whole answer of this length."""
    return b"HTTP/1.1 %d So\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def chunk(data):
    """A piece of a `CHUNKED` one; `b""` is its end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


WELL = CHUNKED + chunk(ANSWER) + chunk(b"")


class Scripted:
    """Answers posts with `said` in turn, after the last as a sound engine does; `None` closes the connection first.

    A list is said piece by piece, each of which the other end, in this process too, reads by itself.
    """

    def __init__(self):
        self.said = []
        self.pages = {"/v1/models": page(b'{"data":[{"id":"m"}]}'), "/is_paused": page(b"", 404)}
        self.talks = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for talk in self.talks:
            talk.cancel()
        await asyncio.gather(*self.talks, return_exceptions=True)

    async def _talk(self, reader, writer):
        self.talks.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(self.pages.get(head.split()[1].decode(), page(b"")))
                    continue
                size = int(head.lower().partition(b"content-length:")[2].split()[0])
                await reader.readexactly(size)
                said = self.said.pop(0) if self.said else WELL
                if said is None:
                    break
                for piece in said if isinstance(said, list) else [said]:
                    writer.write(piece)
                    for _ in range(4):
                        await asyncio.sleep(0)
        writer.close()
