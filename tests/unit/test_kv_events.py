"""Both forms of vLLM's KV events say the same."""

import msgspec
import pytest

from scheduler.errors import WireError
from workers.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode

STORED = BlockStored(hashes=(11, 12), parent=None, token_ids=(1, 2, 3, 4), block_tokens=2)
EVENTS = [STORED, BlockRemoved((11,)), AllBlocksCleared()]


def message(*events):
    return msgspec.msgpack.encode([1_700_000_000.5, list(events), 0])


def test_arrays_until_vllm_0_23():
    """Name first, then the fields in order; those added later are passed over."""
    payload = message(
        ["BlockStored", [11, 12], None, [1, 2, 3, 4], 2, None, "GPU", None],
        ["BlockRemoved", [11], "GPU"],
        ["AllBlocksCleared"],
    )

    assert decode(payload) == (1_700_000_000.5, EVENTS)


def test_maps_from_vllm_0_24():
    """The name is the field `type`; unknown fields are passed over."""
    payload = message(
        {
            "type": "BlockStored",
            "block_hashes": [11, 12],
            "parent_block_hash": None,
            "token_ids": [1, 2, 3, 4],
            "block_size": 2,
            "lora_id": None,
            "medium": "GPU",
            "extra_keys": [None, None],
            "group_idx": 0,
        },
        {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU"},
        {"type": "AllBlocksCleared"},
    )

    assert decode(payload) == (1_700_000_000.5, EVENTS)


def test_hashes_may_be_bytes():
    """As vLLM sends them unless it is told to use integers."""
    payload = message(["BlockStored", [b"\x01" * 32], b"\x02" * 32, [1, 2], 2])

    _, (event,) = decode(payload)

    assert (event.hashes, event.parent) == ((b"\x01" * 32,), b"\x02" * 32)


def test_an_event_of_a_kind_not_known_is_left_out():
    """The others still count."""
    assert decode(message(["BlockDreamt", 1], {"type": "BlockDreamt"}, ["AllBlocksCleared"])) == (
        1_700_000_000.5,
        [AllBlocksCleared()],
    )


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1\xff", id="no msgpack"),
        pytest.param(msgspec.msgpack.encode({"a": 1}), id="no array"),
        pytest.param(msgspec.msgpack.encode([1.0]), id="no events"),
        pytest.param(message(["BlockStored", "x", None, [1], 1]), id="hashes that are text"),
        pytest.param(message({"type": "BlockStored"}), id="no fields"),
        pytest.param(message([]), id="an event without a name"),
        pytest.param(msgspec.msgpack.encode([float("inf"), []]), id="after all time"),
        pytest.param(b"\x92\xcb" + bytes(8) + b"\x91" * 10_000, id="a pit"),
        pytest.param(message(["BlockStored", [1], None, [2**32], 1]), id="a token of 33 bits"),
    ],
)
def test_garbage_is_a_wire_error(payload):
    """Whatever the garbage."""
    with pytest.raises(WireError, match="KV events cannot be read"):
        decode(payload)
