"""What a second of an endpoint's time costs: the chance to be on time that somebody else could buy with it.

In overload whoever takes long and will probably be late anyway should give way; with time to spare everybody with
any chance is served. So the least chance asked of a request grows with what waits, and with its own length:

    asked = price * (seconds that others wait for of each endpoint / seconds promised) * (its work / the usual work)

This is a bid price, as in revenue management: worth per second against what the queue says a second is worth.
"""

from collections.abc import Sequence

from scheduler.room import Room
from scheduler.state import Ticket

GAIN = 0.01
"How much of one more request's size the usual size takes over, once it is no longer young."


class Usual:
    """Running means over what was handed over: seconds of work, and tokens of prompt."""

    def __init__(self) -> None:
        """Nothing handed over yet."""
        self.work_s = 0.0
        self.tokens = 0.0
        self._count = 0

    def learn(self, work_s: float, tokens: float) -> None:
        """One more was handed over, which takes an endpoint so long and has so many tokens of prompt."""
        self._count += 1
        gain = max(GAIN, 1 / self._count)
        self.work_s += gain * (work_s - self.work_s)
        self.tokens += gain * (tokens - self.tokens)

    def waits(self, line: Sequence[Ticket], room: Room) -> float:
        """How much waits for each endpoint, in requests of the usual size: what was handed over, and this line.

        Not those set aside who are tried again: they compete only if they are taken up. Nor those who wait for a better
        pace, for whom there is time enough.
        """
        if not self.tokens:
            return 0.0
        ahead_s = room.mean(room.queued_s)
        tokens = [t.prompt_tokens for t in line if t.state != "set_aside" and not t.waits_for_pace]
        return ahead_s / max(self.work_s, 1e-6) + sum(tokens) / self.tokens / room.count

    def share(self, ticket: Ticket, room: Room) -> float:
        """What one of the line is of that; nothing, where it does not compete."""
        if not self.tokens or ticket.state == "set_aside" or ticket.waits_for_pace:
            return 0.0
        return ticket.prompt_tokens / self.tokens / room.count
