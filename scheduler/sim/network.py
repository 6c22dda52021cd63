"""The links over which KV goes from where a prompt was computed to where its answer is decoded.

Each endpoint has one link, as fast out as in. Whoever sends or receives several at once shares it evenly among them,
and a transfer goes at the smaller of its two shares; a share that the other end cannot use is left unused.
"""

import math
from collections import Counter

import msgspec

BITS = 8
GIGA = 1e9


class Transfer(msgspec.Struct, kw_only=True, eq=False):
    """One prompt's KV on its way."""

    request_id: str
    attempt: int
    "Of the decode leg that waits for it."
    source: str
    target: str
    bytes_left: float
    begins_at: float
    "After the handshake; before, it takes no share."


class Network:
    """Driven by `World`: `start` and `stop` transfers, `next_at` says when one is done or begins to flow."""

    def __init__(self, links_gbps: dict[str, float], latency_s: float) -> None:
        """Nothing flows.

        Args:
            links_gbps: gigabits a second of each endpoint's link.
            latency_s: of each transfer's handshake.
        """
        self._bytes_per_second = {name: gbps * GIGA / BITS for name, gbps in links_gbps.items()}
        self._latency_s = latency_s
        self._flowing: list[Transfer] = []
        self._at = 0.0

    def __len__(self) -> int:
        return len(self._flowing)

    def start(self, transfer: Transfer, now: float) -> None:
        """Begin one; `begins_at` is set here."""
        self._flow(now)
        transfer.begins_at = now + self._latency_s
        self._flowing.append(transfer)

    def stop(self, endpoint: str, request_id: str | None, now: float) -> list[Transfer]:
        """Break off what this endpoint sends or receives, of one request or of all; what was broken off."""
        self._flow(now)
        stopped = [
            t
            for t in self._flowing
            if endpoint in (t.source, t.target) and request_id in (None, t.request_id)
        ]
        self._flowing = [t for t in self._flowing if t not in stopped]
        return stopped

    def next_at(self) -> float:
        """When a transfer ends or begins to flow, if nothing changes; `inf`: none is under way."""
        rates = self._rates()
        return min(
            (
                self._at + t.bytes_left / rates[at] if rates[at] else t.begins_at
                for at, t in enumerate(self._flowing)
            ),
            default=math.inf,
        )

    def ended(self, now: float) -> list[Transfer]:
        """Those that are through by now, in the order in which they began."""
        self._flow(now)
        through = [t for t in self._flowing if t.bytes_left <= 0.5 and t.begins_at <= now]
        self._flowing = [t for t in self._flowing if t not in through]
        return through

    def _flow(self, now: float) -> None:
        """Let the bytes move up to this moment; nothing begins or ends in between."""
        for rate, transfer in zip(self._rates(), self._flowing, strict=True):
            transfer.bytes_left -= rate * (now - self._at)
        self._at = now

    def _rates(self) -> list[float]:
        """Bytes a second of each; 0 before its handshake is over."""
        flowing = [t for t in self._flowing if t.begins_at <= self._at]
        out, into = Counter(t.source for t in flowing), Counter(t.target for t in flowing)
        link = self._bytes_per_second
        return [
            min(link[t.source] / out[t.source], link[t.target] / into[t.target])
            if t.begins_at <= self._at
            else 0.0
            for t in self._flowing
        ]
