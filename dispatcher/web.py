"""The dispatcher's own small web face: is it alive, is it ready, what does it count."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from scheduler.errors import SettingsError

HOST = "0.0.0.0"  # noqa: S104  probes and scrapers come from outside; nothing here changes anything


class Pages:
    """What each page says: a reason for 503, or nothing for 200."""

    def __init__(
        self,
        *,
        unhealthy: Callable[[], str],
        unready: Callable[[], str],
        metrics: Callable[[], bytes],
    ) -> None:
        """Each is asked anew for every visit."""
        self._unhealthy = unhealthy
        self._unready = unready
        self._metrics = metrics

    def add_to(self, app: web.Application) -> None:
        """Serve them among an application's own."""
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics_page)

    @asynccontextmanager
    async def served(self, port: int) -> AsyncIterator[int]:
        """Serve while the block runs; the port, also where 0 asked for a free one.

        Raises:
            SettingsError: the port cannot be had.
        """
        app = web.Application()
        self.add_to(app)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, HOST, port)
            try:
                await site.start()
            except OSError as error:
                reason = error.strerror or error
                raise SettingsError(
                    f"metrics port is {port}, wanted a free one: {reason}"
                ) from None
            yield int(runner.addresses[0][1])
        finally:
            await runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return _verdict(self._unhealthy())

    async def _readyz(self, _: web.Request) -> web.Response:
        return _verdict(self._unready())

    async def _metrics_page(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )


def _verdict(reason: str) -> web.Response:
    return web.Response(status=503 if reason else 200, text=f"{reason or 'ok'}\n")
