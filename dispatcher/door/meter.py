"""What the door counts. Base units; names fixed for good."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

FIRST_BYTE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
WHOLE_S = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)
HAND_IN_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


class Meter:
    """All of a door's metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "headgate_door_requests",
            "Answers by path, HTTP status and, where it is an error, the reason.",
            ("path", "status", "reason"),
            registry=self.registry,
        )
        self.broken = Counter(
            "headgate_door_streams_broken",
            "Streams that ended in an error after their first byte, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.open = Gauge(
            "headgate_door_open_requests", "Requests being answered.", registry=self.registry
        )
        self.gone = Counter(
            "headgate_door_disconnects",
            "Clients that went away before their answer was complete.",
            registry=self.registry,
        )
        self.cancelled = Counter(
            "headgate_door_cancels", "Requests cancelled for that.", registry=self.registry
        )
        self.hand_in = Histogram(
            "headgate_door_hand_in_seconds",
            "From understanding a request to its being in Redis.",
            buckets=HAND_IN_S,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "headgate_door_time_to_first_byte_seconds",
            "From a request's arrival to its answer's first byte.",
            buckets=FIRST_BYTE_S,
            registry=self.registry,
        )
        self.whole = Histogram(
            "headgate_door_request_seconds",
            "From a request's arrival to its answer's end.",
            buckets=WHOLE_S,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
