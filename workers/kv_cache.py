"""One engine's prefix cache as its worker follows it: events in, an account of it in every beat.

engine ──ZeroMQ──> feed ──> mirror ──account──> beat ──> the dispatcher's index
          text <── binder ───^
"""

import asyncio

from scheduler.prefix import Account
from scheduler.wire.dispatcher import Job
from workers.body import Body
from workers.engine import Engine
from workers.kv_binder import Binder
from workers.kv_feed import Feed, Source
from workers.kv_mirror import Mirror


class KvCache:
    """Without events it has nothing to tell, and costs nothing. `run` is its task."""

    def __init__(self, engine: Engine, name: str) -> None:
        """`name` is the endpoint's."""
        self._mirror = Mirror()
        self._feed = Feed(self._mirror, name=name)
        self._binder = Binder(engine, self._mirror)

    async def run(self) -> None:
        """Follow the engine for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed.run())
            group.create_task(self._binder.run())

    def came(self, source: Source | None) -> None:
        """The engine is there, and publishes its events there, if at all."""
        self._feed.turn_to(source)

    def computed(self, job: Job, body: Body) -> None:
        """The engine has this prompt in its cache."""
        self._binder.computed(job, body)

    def account(self) -> Account:
        """What the next beat is to tell."""
        return self._mirror.teller.account()

    def told(self, epoch: int, seq: int) -> bool:
        """That account has arrived; True where more should follow at once."""
        self._mirror.teller.told(epoch, seq)
        return self._mirror.teller.has_news
