"""Engines of the lab say what they cache, others use them too, and a dispatcher believes what it is told."""

import numpy as np
import pytest
from msgspec import structs
from taped import talk

from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import SettingsError
from scheduler.events import Arrived
from scheduler.prefix import BLOCK_TOKENS, Account, Index
from scheduler.sim import arriving, cells, chain, fleet, truth, visits
from scheduler.sim.fleet import CERTAIN, Delays, EndpointSpec, Fault, Fleet
from scheduler.sim.visits import Visit
from scheduler.sim.workload import Arrival
from scheduler.sim.world import World
from scheduler.wire.worker import Beat

TINY = Fleet(
    name="tiny",
    endpoints=(
        EndpointSpec(
            profile="a100",
            count=2,
            engine=structs.replace(EndpointSpec(profile="a100").engine, kv_tokens=8_000),
        ),
    ),
    chance=CERTAIN,
    faults=(
        Fault(at_s=12.0, endpoint="a100-1", kind="die"),
        Fault(at_s=18.0, endpoint="a100-1", kind="join"),
    ),
)
PROMPT = Arrival(
    at_s=0.0, prompt_tokens=2000, output_tokens=2, blocks=tuple(range(15)), block_tokens=128
)


class Listener:
    """The core, and an index of somebody who has no beliefs of his own."""

    def __init__(self, names):
        self.core = Scheduler(CoreSettings(), np.random.default_rng(0))
        self.slots = {name: slot for slot, name in enumerate(names)}
        self.epochs = dict.fromkeys(names, 0)
        self.index = Index()
        self.asked = set()

    def receive(self, event, now):
        self.core.receive(event, now)
        if isinstance(event, Arrived):
            self.asked.add(event.request.id)
        if isinstance(event, Beat):
            self.hear(event)

    def hear(self, beat):
        slot = self.slots[beat.endpoint]
        if beat.epoch > self.epochs[beat.endpoint]:
            self.epochs[beat.endpoint] = beat.epoch
            self.index.open(slot, 0)
        self.index.hear(
            slot,
            Account(
                epoch=beat.kv_epoch,
                seq=beat.kv_seq,
                stored=beat.kv_stored,
                removed=beat.kv_removed,
                rest=beat.kv_rest,
                was_empty=beat.kv_was_empty,
            ),
        )

    def decide(self, now):
        return self.core.decide(now)

    def wakeup_at(self):
        return self.core.wakeup_at()


def played(rows, *, where=TINY, publishes=True, others=()):
    """A run, and who listened."""
    machines = fleet.machines(where, 0)
    run = World(
        rows,
        machines,
        delays=Delays(),
        is_open=False,
        publishes=publishes,
        others=others,
        faults=where.faults,
    )
    listener = Listener([one.name for one in machines])
    run.run(listener)
    return run, listener


class TestTold:
    @pytest.mark.parametrize("block_tokens", [128, 50, 512])
    def test_what_is_told_is_what_engines_hold(self, block_tokens):
        """Under evictions, visits, a death and a return: block for block, however traces cut their prompts."""
        rows = tuple(
            structs.replace(row, arrival=structs.replace(row.arrival, block_tokens=block_tokens))
            for row in talk()
        )
        rows = arriving.rows([row.arrival for row in rows])
        own, others = visits.parted(rows, 0.3, ["a100-0", "a100-1"], np.random.default_rng(0))
        run, listener = played(own, others=others)
        for endpoint in run.endpoints.values():
            while (last := endpoint.beat(run.now)).kv_stored or last.kv_removed:
                listener.hear(last)

        depths = []
        for row in rows:
            told = listener.index.match(row.request.blocks)
            for slot, endpoint in enumerate(run.endpoints.values()):
                keys = chain.keys(row.arrival, 16)
                held = endpoint.engine.kv.match(keys, len(keys)) * 16 // BLOCK_TOKENS
                depths.append(held)
                assert told.get(slot, 0) == held
        assert 0 in depths
        assert max(depths) > 0

    def test_who_is_not_told_to_publish_says_nothing(self):
        """As vLLM without `--kv-events-config`."""
        _, listener = played(talk(span_s=3.0), publishes=False)

        assert not any(listener.index.match(row.request.blocks) for row in talk(span_s=3.0))


class TestVisits:
    """Somebody else's requests, past the dispatcher."""

    def test_what_they_leave_in_a_cache_is_found_where_it_is_told(self):
        """The same prompt was asked of one engine by somebody else: ours goes there if it knows."""
        calm = structs.replace(TINY, faults=())
        rows = arriving.rows([structs.replace(PROMPT, at_s=5.0)])
        usual = played(rows, where=calm)[0].fates[0].endpoint
        other = {"a100-0": "a100-1", "a100-1": "a100-0"}[usual]
        visit = Visit(arriving.rows([PROMPT])[0], other)

        ends = {}
        for publishes in (False, True):
            run, listener = played(rows, where=calm, publishes=publishes, others=[visit])
            ends[publishes] = run.fates[0]
            assert listener.asked == {"0"}

        assert (ends[True].endpoint, ends[True].believed_tokens) == (other, 1920)
        assert ends[True].cached_tokens >= 1920
        assert (ends[False].endpoint, ends[False].cached_tokens) == (usual, 0)
        assert ends[True].best_tokens == ends[False].best_tokens == ends[True].cached_tokens

    def test_they_take_time_of_engines(self):
        """Who comes at the same moment as four long prompts of others waits for them."""
        calm = structs.replace(TINY, faults=())
        alone, _ = played(arriving.rows([PROMPT]), where=calm)
        others = [
            Visit(row, name)
            for row in arriving.rows([structs.replace(PROMPT, blocks=(), block_tokens=0)] * 2)
            for name in ("a100-0", "a100-1")
        ]
        beside, _ = played(arriving.rows([PROMPT]), where=calm, others=others)

        assert beside.fates[0].ttft_s > 1.5 * alone.fates[0].ttft_s

    def test_conversations_go_one_way(self):
        """All turns of a conversation are ours or somebody else's; ours are numbered through."""
        rows = talk()

        own, others = visits.parted(rows, 0.4, ["a", "b"], np.random.default_rng(0))

        ours = {row.arrival.session for row in own}
        theirs = {visit.row.arrival.session for visit in others}
        assert ours.isdisjoint(theirs)
        assert len(own) + len(others) == len(rows)
        assert [row.request.id for row in own] == [str(at) for at in range(len(own))]
        assert {visit.endpoint for visit in others} == {"a", "b"}

    def test_a_closed_loop_has_none(self):
        """Its turns wait for turns before, which others' engines would have to report."""
        text = """
[cells.one]
asks = "x"
fleet = "a30x8"
policies = ["plan"]
baseline = "plan"
metrics = ["on_time"]
loads = [0.5]
windows = [200]
window_s = 10
run_in_s = 0
seeds = 1
closed = true
foreign = 0.5
parts = [{trace = "t"}]
"""
        with pytest.raises(SettingsError, match=r"one: foreign is 0\.5 in a closed loop, wanted 0"):
            cells.parse(text, "mine")


def test_the_fullest_cache_is_the_best_of_the_living():
    """Nobody holds what nobody was sent; a cache that is switched off finds nothing."""
    one, other = (machine.engine() for machine in fleet.machines(TINY, 0))

    assert truth.best_cached_tokens([], PROMPT) == 0
    assert truth.best_cached_tokens([one, other], PROMPT) == 0
