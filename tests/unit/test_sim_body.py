"""Bodies have exactly the tokens of their row, and share exactly the prefix it shares."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.sim.body import FIRST_TOKEN, VOCABULARY, body, bound
from scheduler.sim.workload import Arrival

COUNTS = st.integers(1, 700)
BLOCKS = st.lists(st.integers(0, 2**63), max_size=9).map(tuple)
SIZES = st.sampled_from([1, 4, 16, 50, 64])


def row(prompt=20, blocks=(), block_tokens=4, at_s=0.0, output=7):
    return Arrival(
        at_s=at_s,
        prompt_tokens=prompt,
        output_tokens=output,
        blocks=blocks,
        block_tokens=block_tokens if blocks else 0,
    )


def prompt(arrival, form="text", **options):
    return json.loads(body(arrival, "llama", form, **options))["prompt"]


@given(n=COUNTS, blocks=BLOCKS, size=SIZES)
def test_text_is_four_bytes_a_token(n, blocks, size):
    """Whatever the blocks cover, the prompt has exactly 4 bytes for each of its tokens."""
    text = prompt(row(n, blocks, size))

    assert len(text.encode()) == 4 * n


@given(n=COUNTS, blocks=BLOCKS, size=SIZES, vocabulary=st.integers(2000, 200_000))
def test_token_ids_are_counted_and_inside_the_vocabulary(n, blocks, size, vocabulary):
    """As many ids as tokens, none special, none beyond the vocabulary."""
    ids = prompt(row(n, blocks, size), "tokens", vocabulary=vocabulary)

    assert len(ids) == n
    assert all(FIRST_TOKEN <= i < vocabulary for i in ids)


@pytest.mark.parametrize(("form", "unit"), [("text", 4), ("tokens", 1)])
def test_equal_blocks_are_equal_prefixes(form, unit):
    """Two rows agree on their common blocks, and differ in the block after them."""
    one = prompt(row(200, (5, 6, 7), 64), form)
    two = prompt(row(300, (5, 6, 8, 9), 64), form)

    shared = 2 * 64 * unit
    assert one[:shared] == two[:shared]
    assert one[shared : shared + 16 * unit] != two[shared : shared + 16 * unit]


@pytest.mark.parametrize("form", ["text", "tokens"])
@given(a=st.integers(0, 2**40), b=st.integers(0, 2**40))
def test_different_blocks_never_look_alike(form, a, b):
    """A block of 16 tokens, the smallest that vLLM shares, tells any two ids apart."""
    equal = prompt(row(16, (a,), 16), form) == prompt(row(16, (b,), 16), form)

    assert equal == (a == b)


def test_a_repeated_digit_is_not_a_longer_one():
    """Id x and the id that is x twice in the base of the vocabulary differ."""
    base = VOCABULARY - FIRST_TOKEN

    assert prompt(row(16, (5,), 16), "tokens") != prompt(row(16, (5 + 5 * base,), 16), "tokens")


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_rows_without_blocks_share_nothing(form):
    """Same moment and length, another row: the first cacheable block differs already."""
    first = {tuple(prompt(row(400), form, row=i)[:64]) for i in range(50)}
    by_moment = {tuple(prompt(row(400, at_s=i / 7), form)[:64]) for i in range(50)}

    assert len(first) == len(by_moment) == 50


def test_tails_behind_shared_blocks_are_unique():
    """What no block id covers is nobody else's."""
    one, two = (prompt(row(100, (1,), 16), row=i) for i in (0, 1))

    assert one[:64] == two[:64]
    assert one[64:128] != two[64:128]


def test_golden_bodies():
    """The bytes of a body are fixed: the emulated caches of two runs must agree."""
    arrival = row(10, (10, 11), 4, at_s=0.5)
    rest = b',"max_tokens":256,"stream":true,"vllm_xargs":{"output_tokens":7}}'

    text = b'{"model":"m","prompt":"ba0000000000000 bb0000000000000 u0000000"' + rest
    ids = b"[1010,1000,1000,1000,1011,1000,1000,1000,15336,11472]"
    assert body(arrival, "m") == text
    assert body(arrival, "m", "tokens", row=3) == b'{"model":"m","prompt":' + ids + rest


def test_faces():
    """A chat carries the same text in one user message; streaming and the bound can be set."""
    arrival = row(8)
    chat = json.loads(body(arrival, "m", face="chat", stream=False, max_tokens=99))

    assert chat["messages"] == [{"role": "user", "content": prompt(arrival)}]
    assert (chat["stream"], chat["max_tokens"]) == (False, 99)
    assert chat["vllm_xargs"] == {"output_tokens": 7}


def test_a_chat_of_ids_does_not_exist():
    """The chat API takes no token ids; a tiny vocabulary cannot tell blocks apart."""
    with pytest.raises(ValueError, match="wanted 'completions'"):
        body(row(), "m", "tokens", face="chat")
    with pytest.raises(ValueError, match="vocabulary is 900, wanted at least 2000"):
        body(row(), "m", "tokens", vocabulary=900)


@given(output=st.integers(1, 100_000))
def test_the_bound_is_generous_and_round(output):
    """Twice the truth always fits, and only powers of two are ever said."""
    most = bound(output)

    assert most > 2 * output
    assert most >= 256
    assert most & (most - 1) == 0
