"""What an endpoint's beats say: what it is, how it does, what it holds and what its engine has cached."""

from time import perf_counter

from scheduler.settings import EngineAddress
from scheduler.wire.words import EndpointState
from scheduler.wire.worker import Beat
from workers.hands import Hands
from workers.health import Health
from workers.holdings import Holdings, following
from workers.inbox import Inbox
from workers.kv_cache import KvCache
from workers.rhythm import Rhythm


class Telling:
    """Puts together one endpoint's beats."""

    def __init__(
        self,
        address: EngineAddress,
        *,
        worker: str,
        beat_s: float,
        health: Health,
        rhythm: Rhythm,
        hands: Hands,
        inbox: Inbox,
        kv: KvCache,
    ) -> None:
        """Beats come every `beat_s`, and between for the sake of news."""
        self._address, self._worker, self._beat_s = address, worker, beat_s
        self._health, self._rhythm, self._hands = health, rhythm, hands
        self._inbox, self._kv = inbox, kv
        self._said = Holdings()
        self._said_tick = float("-inf")

    def beat(
        self,
        epoch: int,
        state: EndpointState,
        reason: str,
        started: tuple[str, ...],
        first_tokens: tuple[str, ...],
    ) -> Beat:
        """The next one."""
        health, load, address = self._health, self._health.load, self._address
        read_at = self._inbox.read_at if self._names_what_it_holds() else None
        said = Holdings() if read_at is None else self._said
        kv = self._kv.account()
        return Beat(
            endpoint=address.name,
            epoch=epoch,
            worker=self._worker,
            state=state,
            reason=reason,
            roles=address.roles,
            models=health.models,
            hardware=address.hardware,
            max_num_seqs=address.max_num_seqs,
            kv_tokens=load.kv_tokens,
            block_tokens=load.block_tokens,
            no_prefix_cache=load.no_prefix_cache,
            max_model_len=health.max_model_len,
            link_gbps=address.link_gbps,
            kv_token_bytes=address.kv_token_bytes,
            running=load.running,
            queued=load.queued,
            held=len(self._hands.held),
            kv_usage=load.kv_usage,
            step_s=self._rhythm.step_s,
            scraped_at=health.load_at,
            engine=health.features.version,
            features=health.features.names,
            started=started,
            first_tokens=first_tokens,
            read_at=read_at,
            holds=said.names,
            holds_after=said.after,
            holds_to=said.to,
            kv_epoch=kv.epoch,
            kv_seq=kv.seq,
            kv_stored=kv.stored,
            kv_removed=kv.removed,
            kv_rest=kv.rest,
            kv_was_empty=kv.was_empty,
        )

    def _names_what_it_holds(self) -> bool:
        """Whether this beat does: one each `beat_s`, however many there are for the sake of news."""
        tick = perf_counter()
        if self._inbox.read_at is None or tick - self._said_tick < 0.9 * self._beat_s:
            return False
        held = ((one.job.id, one.job.attempt) for one in self._hands.all.values())
        self._said, self._said_tick = following(held, self._said), tick
        return True
