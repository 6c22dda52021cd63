"""KV between two engines: what is kept, fetched and lost adds up, whatever happens on the way."""

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.sim import profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.engine import Engine
from scheduler.sim.network import Network, Transfer
from scheduler.sim.sequence import Sequence

A100 = profile.load("a100")

REQUESTS = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=10
)
SMALL = st.builds(
    EngineSettings,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(8, 64),
    block_size=st.sampled_from([1, 4, 16]),
    kv_tokens=st.integers(144, 400),
    prefix_caching=st.booleans(),
    reserve_full_isl=st.booleans(),
)


def keys_of(number: int, group: int, tokens: int, block_size: int) -> list[int]:
    """Chained keys that some prompts share the first of."""
    return [
        group + 10 * at if at < 1 else 1000 * (number + 1) + at
        for at in range(tokens // block_size)
    ]


def run(engine: Engine, now: float) -> float:
    """Step until there is nothing to do; when that is."""
    while (step := engine.step(now)) is not None:
        now = step.ended_at
    return now


@settings(max_examples=25)
@given(requests=REQUESTS, chosen=SMALL, data=st.data())
def test_kv_adds_up_over_both_engines(requests, chosen, data):
    """Kept blocks are held until forgotten, fetched ones from admission on; at the end nobody holds any."""
    prefill, decode = Engine(A100, chosen), Engine(A100, chosen)
    tokens, coming = {}, []
    for number, (prompt, output, group) in enumerate(requests):
        name = str(number)
        keys = keys_of(number, group, prompt + output, chosen.block_size)
        prefill.add(
            Sequence(name, prompt_tokens=prompt, output_tokens=1, keys=keys, hands_over=True)
        )
        second = Sequence(
            name, prompt_tokens=prompt, output_tokens=output, keys=keys, is_remote=True
        )
        coming.append(second)
        tokens[name] = output
    now, waiting, got = 0.0, [], dict.fromkeys(tokens, 0)
    for _ in range(800):
        now = run(prefill, now)
        assert prefill.kv.used <= prefill.kv.capacity
        assert prefill.n_running == 0
        kept = prefill.holdings.kept
        assert sum(map(len, kept.values())) >= prefill.kv.used, "what is used is what is kept"
        for second in [s for s in coming if s.id in kept]:
            coming.remove(second)
            decode.add(second)
        step = decode.step(now)
        waiting += decode.take_loading()
        ready = [s for s in waiting if s.id in kept]
        if ready:
            fetched = data.draw(st.sampled_from(ready))
            waiting.remove(fetched)
            assert decode.loaded(fetched.id)
            prefill.forget(fetched.id)
        if step is not None:
            now = step.ended_at
            for sequence in step.decoded:
                got[sequence.id] += 1
            for sequence in step.prefilled:
                got[sequence.id] += 1
        elif not ready:
            break
    assert all(got[name] == wanted for name, wanted in tokens.items())
    assert (prefill.kv.used, prefill.holdings.kept, decode.kv.used) == (0, {}, 0)


@settings(max_examples=60)
@given(requests=REQUESTS, chosen=SMALL, data=st.data())
def test_abort_frees_what_was_to_be_fetched(requests, chosen, data):
    """Waiting for its KV, loaded or decoding: an abort leaves no block behind."""
    engine = Engine(A100, chosen)
    for number, (prompt, output, _) in enumerate(requests):
        engine.add(
            Sequence(str(number), prompt_tokens=prompt, output_tokens=output, is_remote=True)
        )
    now = 0.0
    for name in data.draw(st.permutations([str(n) for n in range(len(requests))])):
        step = engine.step(now)
        now = now if step is None else step.ended_at
        for sequence in engine.take_loading():
            if data.draw(st.booleans()):
                engine.loaded(sequence.id)
        engine.abort(name)
    assert (engine.kv.used, engine.n_running, engine.n_waiting) == (0, 0, 0)


@given(
    sizes=st.lists(st.floats(1e3, 1e9), min_size=1, max_size=8),
    ends=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=8, max_size=8),
)
def test_links_carry_what_they_can_and_no_more(sizes, ends):
    """All bytes arrive, in order of time, and no link is faster than declared."""
    network = Network({"p0": 80.0, "p1": 80.0, "d0": 80.0, "d1": 40.0}, latency_s=0.003)
    for at, size in enumerate(sizes):
        source, target = ends[at]
        network.start(
            Transfer(
                request_id=str(at),
                attempt=1,
                source=f"p{source}",
                target=f"d{target}",
                bytes_left=size,
                begins_at=0.0,
            ),
            0.0,
        )
    now, done = 0.0, {}
    while len(network):
        assert network.next_at() >= now
        now = network.next_at()
        for transfer in network.ended(now):
            done[transfer.request_id] = now
    assert len(done) == len(sizes)
    for link, speed in (("d0", 10e9), ("d1", 5e9)):
        mine = [at for at in range(len(sizes)) if f"d{ends[at][1]}" == link]
        if mine:
            last = max(done[str(at)] for at in mine)
            assert last >= 0.003 + sum(sizes[at] for at in mine) / speed - 1e-6


def test_a_lone_transfer_takes_its_bytes_over_the_slower_link():
    """10 GB/s and 5 GB/s: one gigabyte takes 0.2 s and the handshake."""
    network = Network({"p": 80.0, "d": 40.0}, latency_s=0.003)
    lone = Transfer(
        request_id="r", attempt=1, source="p", target="d", bytes_left=1e9, begins_at=0.0
    )
    network.start(lone, 0.0)
    assert network.next_at() == 0.003
    assert network.ended(0.003) == []
    assert abs(network.next_at() - 0.203) < 1e-9
