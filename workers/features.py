"""What an engine can do beyond answering, found out by looking: versions differ, and so do the flags they run with.

Everything here is optional. The worker uses what is there and does without what is not.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from scheduler.errors import UNREADABLE
from scheduler.settings import EngineAddress
from workers import kv_feed
from workers.engine import Engine
from workers.kv_feed import Source

VERSION = "/version"
PAUSED = "/is_paused"
KV_EVENTS = "/kv_event_sources"

REJECTIONS = b"vllm:admission_rejections_total"


class Features(msgspec.Struct, frozen=True):
    """What was found."""

    version: str = ""
    "The engine's own; empty: it does not say."

    names: tuple[str, ...] = ()
    """
    Of these, in this order: `request_metrics` (times in the last chunk), `cached_tokens` (in usage), `priority` (as the
    worker was told), `admission` (the engine counts refusals, so it knows limits), `pause` (a drain that can be taken
    back; development mode), `kv_events` (it publishes what it caches).
    """

    kv_events: Source | None = None
    "Where it publishes them."


async def found(engine: Engine, model: str, address: EngineAddress) -> Features:
    """Look at one engine that is ready; costs it a few small requests and one token.

    Raises:
        EngineError: it did not answer.
    """
    said = await engine.one_token(model)
    source = kv_feed.source_in(await engine.page(KV_EVENTS), address.url)
    if address.kv_events:
        source = Source(address.kv_events, address.kv_replay)
    has = {
        "request_metrics": said.metrics is not None,
        "cached_tokens": said.cached_tokens is not None,
        "priority": address.by_priority,
        "admission": REJECTIONS in (await engine.page("/metrics")),
        "pause": b"is_paused" in (await engine.page(PAUSED)),
        "kv_events": source is not None,
    }
    names = tuple(name for name, is_there in has.items() if is_there)
    return Features(version_in(await engine.page(VERSION)), names, source)


def version_in(page: bytes) -> str:
    """The version that the page names.

    >>> version_in(b'{"version":"0.32.0"}'), version_in(b"")
    ('0.32.0', '')
    """
    try:
        return msgspec.json.decode(page, type=_Version).version
    except UNREADABLE:
        return ""


class _Version(msgspec.Struct):
    version: Annotated[str, Meta(max_length=128)] = ""
