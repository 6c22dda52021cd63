"""How long a request waits for the endpoint that has its prefix cached, where no KV is free.

Elsewhere the prefix would be computed once more. Nobody knows when KV will be free here, and nothing here guesses it.
A request that waits for as long as it would save, and then goes elsewhere, pays at most twice what the better of the
two would have cost, had we known (the ski rental problem).
"""

import math

from scheduler.room import Room
from scheduler.state import Floats
from scheduler.work import Offer

SURE = 2.0
"It waits only while its promise leaves so many times the predicted seconds to a first token elsewhere."


def waits_until(offer: Offer, total_s: Floats, best: int, *, room: Room, patience: float) -> float:
    """The moment until which it waits, unix seconds; `-inf` where waiting saves nothing.

    Args:
        offer: what is to be put somewhere.
        total_s: float64[n_slots], seconds to its first token; `inf` where it cannot go now.
        best: the slot where they are fewest.
        room: of the step.
        patience: it waits for so many times the seconds saved, from when it came.
    """
    if patience <= 0 or offer.work.cached is None or not room.is_tight(offer.kv):
        return -math.inf
    saved_s = _saved_s(offer, offer.work.cached, total_s, best, room)
    if saved_s <= 0:
        return -math.inf
    ticket = offer.ticket
    return min(ticket.enqueued_at + patience * saved_s, ticket.due_at - SURE * total_s.item(best))


def _saved_s(offer: Offer, cached: Floats, total_s: Floats, best: int, room: Room) -> float:
    """By how much its first token would come sooner, had the endpoint that suits it best the KV.

    No more than what `best` would compute once more: a faster endpoint alone is not waited for, as the slower one
    would stand idle meanwhile.
    """
    there_s = room.open_s + offer.service_s
    there_s[total_s < math.inf] = math.inf
    full = int(there_s.argmin())
    sooner_s = total_s.item(best) - there_s.item(full)
    if sooner_s <= 0:
        return 0.0
    most, least, rates = cached.item(full), cached.item(best), room.rates
    pair_s = 0.5 * (most + least) * rates.pair_s.item(best)
    return min(sooner_s, (most - least) * (rates.token_s.item(best) + pair_s))
