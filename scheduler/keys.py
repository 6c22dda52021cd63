"""The names of everything a pool keeps in Redis, built in this one place.

All of a pool's keys share one hash tag, so a Cluster keeps them in one slot and every move stays atomic.
"""

from functools import cached_property

import msgspec

from scheduler.errors import SettingsError

DISPATCHER_GROUP = "dispatcher"
WORKER_GROUP = "worker"


class Keys(msgspec.Struct, frozen=True, dict=True):
    """Key names of one pool; each that bears no further name is put together once.

    >>> Keys("hg", "chat").jobs("a100-0")
    'hg:{chat}:jobs:a100-0'
    """

    prefix: str = "hg"
    pool: str = "default"

    def __post_init__(self) -> None:
        for what, name in (("prefix", self.prefix), ("pool", self.pool)):
            if not name or not all(c.isalnum() or c in "._-" for c in name):
                raise SettingsError(f"{what} is {name!r}, wanted letters, digits, '.', '_' or '-'")

    @cached_property
    def root(self) -> str:
        """What every key of the pool begins with."""
        return f"{self.prefix}:{{{self.pool}}}:"

    @cached_property
    def requests(self) -> str:
        """Ingress stream. An entry stays pending in its group until the request is terminal."""
        return self.root + "requests"

    @cached_property
    def controls(self) -> str:
        """What people ask for: to cancel a request, to drain or resume an endpoint."""
        return self.root + "controls"

    @cached_property
    def beats(self) -> str:
        """Heartbeats and progress of the endpoints."""
        return self.root + "beats"

    @cached_property
    def rewards(self) -> str:
        """What each leg cost, with the decision's features."""
        return self.root + "rewards"

    @cached_property
    def results(self) -> str:
        """Terminal records of requests that name no `reply_to`."""
        return self.root + "results"

    @cached_property
    def decisions(self) -> str:
        """Every decision, for explain, replay and off-policy evaluation."""
        return self.root + "decisions"

    @cached_property
    def dead(self) -> str:
        """What could not be read, or failed for good."""
        return self.root + "dead"

    @cached_property
    def waiting(self) -> str:
        """Sorted set of waiting ids by deadline, for people and autoscalers."""
        return self.root + "waiting"

    @cached_property
    def leader(self) -> str:
        """Hash with the leader's lease: node, epoch, until."""
        return self.root + "leader"

    @cached_property
    def snapshot(self) -> str:
        """The learner's warm-start state."""
        return self.root + "snapshot"

    def jobs(self, endpoint: str) -> str:
        """An endpoint's own stream of jobs."""
        return f"{self.root}jobs:{endpoint}"

    def endpoint(self, endpoint: str) -> str:
        """Hash: one glance at an endpoint."""
        return f"{self.root}endpoint:{endpoint}"

    def request(self, request_id: str) -> str:
        """Hash: where a request stands, and the fence (its attempt) that a late write must pass."""
        return f"{self.root}request:{request_id}"

    def body(self, request_id: str) -> str:
        """Claim check of a body too long for its entry."""
        return f"{self.root}body:{request_id}"

    def kv(self, request_id: str) -> str:
        """Claim check of a prefill leg's word on where its KV is; gone soon after the KV is."""
        return f"{self.root}kv:{request_id}"

    def tokens(self, request_id: str) -> str:
        """A request's token log."""
        return f"{self.root}tokens:{request_id}"

    def reply(self, client: str) -> str:
        """A client's own stream of terminal records; the only names a `reply_to` may have."""
        return f"{self.results}:{client}"
