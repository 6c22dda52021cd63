"""The door's connections: aiohttp's own, that wait for a request's head no longer than for its body.

aiohttp keeps an idle connection for an hour, rightly: a proxy may send on it at any time. But it waits as long for the
rest of half a head, and for the first word of who connects and says nothing.
"""

import asyncio
import logging
import ssl

from aiohttp import web


class Punctual(web.RequestHandler):
    """A connection that is closed where a head has not come whole within `head_s`: of the connection, or of its first byte."""

    __slots__ = ("_head_s", "_late")

    def __init__(self, server: web.Server, *, head_s: float, logger: logging.Logger) -> None:
        """`logger` hears of what is no HTTP, and not who asks for what."""
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            logger=logger,
            access_log=None,  # type: ignore[arg-type]  # None is none, as everywhere in aiohttp
        )
        self._head_s = head_s
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head that has begun, and no more for one that is whole."""
        known = self._request_count
        super().data_received(data)
        if self._request_count > known:
            self._came()
        elif self._late is None and self._waiter is not None:  # who is being served sends a body
            self._expect()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait for nothing."""
        self._came()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._late = self._loop.call_later(self._head_s, self.force_close)

    def _came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Site(web.BaseSite):
    """A port of such connections."""

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        *,
        head_s: float,
        backlog: int,
        ssl_context: ssl.SSLContext | None,
        logger: logging.Logger,
    ) -> None:
        """`logger` hears of what is no HTTP."""
        super().__init__(runner, ssl_context=ssl_context, backlog=backlog)
        self._host, self._port = host, port
        self._head_s, self._logger = head_s, logger

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"{'https' if self._ssl_context else 'http'}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen."""
        await super().start()
        server = self._runner.server
        assert server is not None, "a site was started before its runner was set up"
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Punctual(server, head_s=self._head_s, logger=self._logger),
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
        )
