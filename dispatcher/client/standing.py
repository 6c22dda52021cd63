"""Where a request stands, as its hash in Redis says."""

from collections.abc import Mapping

import msgspec

from scheduler.lifecycle import State


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One request at a glance."""

    id: str
    state: State | str
    "As in the lifecycle; `set_aside` is `waiting` here, for Redis does not distinguish them."

    attempt: int = 0
    "Attempts so far."

    leg: str = "whole"
    "Which part of it the last attempt was: `whole`, `prefill` or `decode`."

    endpoint: str = ""
    "Who has it, or had it last."

    is_cancelled: bool = False
    "Its tombstone is set."

    outcome: str = ""
    "How it ended; empty while it lives."

    entry: str = ""
    "Its entry in `requests`; the milliseconds in it are when its promise's clock started."

    pieces: int = 0
    "Pieces of text in its token log."

    result_stream: str = ""
    "Where its terminal record lies."

    result_entry: str = ""
    "And under which entry."

    @property
    def enqueued_at(self) -> float:
        """Unix seconds."""
        return int(self.entry.partition("-")[0] or 0) / 1e3


def standing(request_id: str, fields: Mapping[bytes, bytes]) -> Standing:
    """The hash `request:<id>` as a struct."""
    text = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    return Standing(
        id=request_id,
        state=text.get("state", "queued"),
        attempt=int(text.get("attempt") or 0),
        leg=text.get("leg", "whole"),
        endpoint=text.get("endpoint", ""),
        is_cancelled=bool(text.get("cancelled")),
        outcome=text.get("outcome", ""),
        entry=text.get("entry", ""),
        pieces=int(text.get("tokens") or 0),
        result_stream=text.get("result_stream", ""),
        result_entry=text.get("result_entry", ""),
    )
