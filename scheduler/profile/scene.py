"""What a part of a profile may know: one request and the fleet, at the moment of the choice.

Nothing in it is a thing of the lab or of the future (I7): the length of the answer is the usual one, the caches are
the dispatcher's belief, the load is its own exact account with this step's earlier choices in it. All arrays are
read-only and indexed by slot; a slot may be empty.
"""

from collections.abc import Mapping

import msgspec

from scheduler.state import Bools, Floats
from scheduler.wire.worker import Beat


class Scene(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request and the fleet. Arrays are float64[n_slots] where nothing else is said."""

    # The request.

    id: str
    model: str
    tenant: str
    session: str
    priority: int
    "Higher first."
    weight: float
    "What keeping its promise is worth."
    prompt_tokens: float
    "At least 1."
    output_tokens: float
    "How long answers usually are, or how long its client expects this one to be."
    left_s: float
    "Until its first token is due; negative: too late; `inf`: nothing promised."
    tpot_s: float | None
    "Promised seconds per token."
    pressed: float
    "How near the pool is to breaking that, or a tighter one, from 0, at ease, to 1; 1 where nothing is promised per token."

    # The fleet.

    beats: tuple[Beat | None, ...]
    "Each endpoint's latest heartbeat: name, models, roles, hardware and, as old as a scrape, its engine's own load."
    eligible: Bools
    "Where it may go at all: ready, of its model and role, long enough."
    work_s: Floats
    "Predicted seconds of the endpoint's time that its prefill takes."
    first_token_s: Floats
    "Predicted seconds to its first token; `inf` where it cannot go now."
    cached_tokens: Floats
    "Of its prompt, what is believed to be in the prefix cache."
    busy_s: Floats
    "Predicted seconds until something new can begin."
    queued: Floats
    "Requests handed over whose first token has not come."
    unbegun: Floats
    "Of those, how many a newcomer would keep waiting: their engine has not begun them. Who is about to begin counts in part."
    queued_tokens: Floats
    "Their uncached tokens, and those of requests for which a place is kept."
    running: Floats
    "Requests that decode."
    kv_used: Floats
    "Part of the KV cache given away, 0 to 1; 0 where unknown."

    # What was done before.

    session_slot: int
    "Where this session was served last; -1: nowhere that is still there."
    given_at: Floats
    "When anything was last handed over there; `-inf`: never."
    cold_at: Floats
    "When a request was last handed over there of which nothing was cached; `-inf`: never."
    model_at: Floats
    "When a request for this model was last handed over there; `-inf`: never."
    now: float
    "Unix seconds."

    data: Mapping[str, Floats]
    "What the profile's fetchers made, by name."

    @property
    def n_slots(self) -> int:
        """Length of every array."""
        return len(self.beats)
