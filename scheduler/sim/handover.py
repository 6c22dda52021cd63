"""KV on its way from the endpoint that computed a prompt to the one that decodes its answer.

    1. a prefill leg ends: its engine keeps the blocks, under a lease, and names them in `Params`
    2. `claim`   the decode leg enters its engine: the KV must still be there; from then on the lease is renewed
    3. `begin`   that engine has room for it: the transfer starts, over both endpoints' links
    4. it is through: the one forgets its blocks, the other goes on

Whoever is lost on the way, the decode leg is handed back, and its prompt is computed again.
"""

import math
from collections.abc import Callable, Mapping

import msgspec

from scheduler.sim.network import Network, Transfer
from scheduler.wire.dispatcher import Job

Later = Callable[[float, Callable[[float], None]], None]
"Calls with a moment when it has come."


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's `kv_transfer_params`, as far as virtual time needs them; nobody between the two engines reads them."""

    do_remote_prefill: bool = True
    remote_engine_id: str
    remote_request_id: str
    remote_attempt: int

    def encode(self) -> bytes:
        """As it rides in rewards and jobs."""
        return msgspec.json.encode(self)


class Party:
    """What an endpoint does for a hand-over; see `Endpoint`."""

    def claim(self, request_id: str, attempt: int) -> bool:
        """Whether it still has this KV; if so, it keeps it until told otherwise."""
        raise NotImplementedError

    def release(self, request_id: str, attempt: int, now: float) -> None:
        """It has been fetched."""
        raise NotImplementedError

    def loaded(self, request_id: str, attempt: int, now: float) -> None:
        """It has come."""
        raise NotImplementedError

    def lose_kv(self, request_id: str, attempt: int, now: float) -> None:
        """It will never come."""
        raise NotImplementedError


class Handover:
    """All transfers of a fleet."""

    def __init__(
        self,
        parties: Mapping[str, Party],
        network: Network,
        later: Later,
        attend: Callable[[str], None],
    ) -> None:
        """Nothing is under way.

        Args:
            parties: the endpoints by name.
            network: their links.
            later: the world's heap.
            attend: an endpoint's next moment may have changed.
        """
        self._parties = parties
        self._network = network
        self._later = later
        self._attend = attend
        self._claims: dict[tuple[str, int], Params] = {}
        "By request and decode attempt."
        self._next_at = math.inf

    def claim(self, job: Job) -> bool:
        """A decode leg enters its engine; False: the KV is gone."""
        params = msgspec.json.decode(job.kv_params, type=Params)
        source = self._parties.get(params.remote_engine_id)
        if source is None or not source.claim(params.remote_request_id, params.remote_attempt):
            return False
        self._claims[job.id, job.attempt] = params
        return True

    def begin(self, target: str, job: Job, size: float, now: float) -> None:
        """Its engine has room: let so many bytes flow."""
        params = self._claims[job.id, job.attempt]
        transfer = Transfer(
            request_id=job.id,
            attempt=job.attempt,
            source=params.remote_engine_id,
            target=target,
            bytes_left=size,
            begins_at=now,
        )
        self._network.start(transfer, now)
        self._plan()

    def give_up(self, job: Job, target: str, now: float) -> None:
        """A decode leg has left before its KV came: who has it may forget it."""
        params = self._claims.pop((job.id, job.attempt), None)
        if params is None:
            return
        self._network.stop(target, job.id, now)
        self._parties[params.remote_engine_id].release(
            params.remote_request_id, params.remote_attempt, now
        )
        self._attend(params.remote_engine_id)
        self._plan()

    def died(self, name: str, now: float) -> None:
        """An endpoint has lost all it held: nothing goes out of it or into it any more."""
        into = {(t.request_id, t.attempt) for t in self._network.stop(name, None, now)}
        for key, params in list(self._claims.items()):
            if params.remote_engine_id == name:
                del self._claims[key]
                self._tell_lost(*key, now)
            elif key in into:
                del self._claims[key]
                source = params.remote_engine_id
                self._parties[source].release(params.remote_request_id, params.remote_attempt, now)
                self._attend(source)
        self._plan()

    def _tell_lost(self, request_id: str, attempt: int, now: float) -> None:
        for name, party in self._parties.items():
            party.lose_kv(request_id, attempt, now)
            self._attend(name)

    def _plan(self) -> None:
        at = self._network.next_at()
        if at != self._next_at:
            self._next_at = at
            if at < math.inf:
                self._later(at, self._turn)

    def _turn(self, now: float) -> None:
        """Some transfer may be through, or begin to flow."""
        if now != self._next_at:
            return
        self._next_at = math.inf
        for transfer in self._network.ended(now):
            params = self._claims.pop((transfer.request_id, transfer.attempt))
            self._parties[transfer.source].release(
                params.remote_request_id, params.remote_attempt, now
            )
            self._parties[transfer.target].loaded(transfer.request_id, transfer.attempt, now)
            self._attend(transfer.source)
            self._attend(transfer.target)
        self._plan()
