"""What holds for the engine whatever is thrown at it."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.sim import profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.engine import Engine
from scheduler.sim.sequence import Sequence

A100 = profile.load("a100")
ENDLESS = 1e12

REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 3),  # arrival
        st.integers(1, 90),  # prompt
        st.integers(1, 40),  # output
        st.integers(0, 3),  # priority
        st.integers(0, 2),  # group that shares a prefix
    ),
    min_size=1,
    max_size=14,
)
SETTINGS = st.builds(
    EngineSettings,
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(8, 64),
    long_prefill_token_threshold=st.sampled_from([0, 5, 16]),
    block_size=st.sampled_from([1, 4, 16]),
    kv_tokens=st.integers(144, 400),
    prefix_caching=st.booleans(),
    reserve_full_isl=st.booleans(),
    scheduling_policy=st.sampled_from(["fcfs", "priority"]),
)


def sequences(requests, block_size):
    shared = 2
    for number, (at, prompt, output, priority, group) in enumerate(sorted(requests)):
        keys = [
            group if index < shared else 1000 * (number + 1) + index
            for index in range((prompt + output) // block_size)
        ]
        keys = [key + 10 * index if index < shared else key for index, key in enumerate(keys)]
        yield Sequence(
            str(number),
            prompt_tokens=prompt,
            output_tokens=output,
            keys=keys,
            priority=priority,
            arrived_at=at,
        )


def drive(engine, arrivals, *, leaps, check=lambda engine: None):
    """Run to the end; the tokens each request got, and the end of every step."""
    tokens = {sequence.id: 0 for sequence in arrivals}
    ends, now, line = [], 0.0, list(arrivals)
    while True:
        while line and line[0].arrived_at <= now:
            engine.add(line.pop(0))
        next_at = line[0].arrived_at if line else ENDLESS
        step = engine.step(now, next_at if leaps else None)
        check(engine)
        if step is None:
            if not line:
                return tokens, ends
            now = next_at
            continue
        for sequence in step.decoded:
            tokens[sequence.id] += step.n_steps
        for sequence in step.prefilled:
            tokens[sequence.id] += 1
        ends += step.ends
        now = step.ended_at


@settings(max_examples=60)
@given(requests=REQUESTS, engine_settings=SETTINGS)
@example(
    # Preempted while nobody else decodes: it rejoins with the very end it had.
    requests=[(0.0, 1, 1, 0, 0)] * 12 + [(0.0, 71, 31, 0, 0), (0.3125, 78, 8, 0, 0)],
    engine_settings=EngineSettings(
        max_num_seqs=3,
        max_num_batched_tokens=8,
        block_size=1,
        kv_tokens=182,
        prefix_caching=False,
        reserve_full_isl=False,
        scheduling_policy="priority",
    ),
)
def test_everybody_gets_exactly_its_tokens(requests, engine_settings):
    """Each request gets its output, no more; then nothing is held and nobody is left."""
    arrivals = list(sequences(requests, engine_settings.block_size))
    engine = Engine(A100, engine_settings)

    def check(engine):
        assert engine.n_running <= engine_settings.max_num_seqs
        assert 0 <= engine.kv.used <= engine.kv.capacity

    tokens, ends = drive(engine, arrivals, leaps=False, check=check)

    assert tokens == {sequence.id: sequence.stop_after for sequence in arrivals}
    assert all(s.output_tokens == s.stop_after for s in arrivals)
    assert all(s.arrived_at <= s.scheduled_at < s.first_token_at <= s.finished_at for s in arrivals)
    assert ends == sorted(ends)
    assert (engine.kv.used, engine.n_running, engine.n_waiting) == (0, 0, 0)


@settings(max_examples=60)
@given(requests=REQUESTS, engine_settings=SETTINGS)
def test_leaping_changes_nothing(requests, engine_settings):
    """A stretch of decoding run in one call ends as it does step by step."""
    stepped = list(sequences(requests, engine_settings.block_size))
    leapt = list(sequences(requests, engine_settings.block_size))

    tokens, ends = drive(Engine(A100, engine_settings), stepped, leaps=False)
    leapt_tokens, leapt_ends = drive(Engine(A100, engine_settings), leapt, leaps=True)

    assert leapt_tokens == tokens
    np.testing.assert_allclose(leapt_ends, ends, rtol=1e-12)
    times = [(s.scheduled_at, s.first_token_at, s.finished_at, s.preemptions) for s in stepped]
    np.testing.assert_allclose(
        [(s.scheduled_at, s.first_token_at, s.finished_at, s.preemptions) for s in leapt],
        times,
        rtol=1e-12,
    )


@settings(max_examples=40)
@given(requests=REQUESTS, engine_settings=SETTINGS, data=st.data())
def test_abort_frees_everything_at_any_moment(requests, engine_settings, data):
    """Aborted waiting, prefilling, decoding or preempted: no block and no slot stays behind."""
    arrivals = list(sequences(requests, engine_settings.block_size))
    engine = Engine(A100, engine_settings)
    for sequence in arrivals:
        engine.add(sequence)

    now = 0.0
    for sequence in data.draw(st.permutations(arrivals)):
        for _ in range(data.draw(st.integers(0, 5))):
            step = engine.step(now)
            now = step.ended_at if step else now
        engine.abort(sequence.id)

    assert (engine.kv.used, engine.n_running, engine.n_waiting) == (0, 0, 0)
    assert engine.step(now) is None
