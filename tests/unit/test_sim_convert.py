"""Other people's files become traces, and what was made up is said."""

import io
import json

import pytest

from scheduler.sim import convert
from scheduler.sim.trace import TraceError

AZURE = b"""\
TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,3180,8\r
"""
MOONCAKE = b"""\
{"timestamp": 3000, "input_length": 600, "output_length": 52, "hash_ids": [0, 46]}
{"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [0]}
"""
BATCH = b"""\
{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","max_tokens":7,\
"messages":[{"role":"system","content":"12345678"},{"role":"user","content":[{"type":"text","text":"90"}]}]}}
{"custom_id":"b","url":"/v1/completions","body":{"model":"m","prompt":[1,2,3,4,5]}}
{"custom_id":"c","url":"/v1/completions","body":{"model":"m","prompt":"\\u00e9\\u00e9\\u00e9","max_tokens":2}}
"""


def converted(kind, data):
    return convert.FORMATS[kind](io.BytesIO(data), name="file")


def rows(found):
    return [(a.at_s, a.prompt_tokens, a.output_tokens) for a in found.arrivals]


def test_azure_stamps_become_seconds_from_the_first():
    """100 ns digits survive, Windows line ends do not matter."""
    assert rows(converted("azure", AZURE)) == [(0.0, 4808, 10), (0.052, 3180, 8)]


def test_mooncake_keeps_its_blocks_and_is_put_in_order():
    """Milliseconds become seconds; hashes stay, with their 512 tokens."""
    found = converted("mooncake", MOONCAKE)

    assert rows(found) == [(0.0, 10, 5), (3.0, 600, 52)]
    assert [(a.blocks, a.block_tokens) for a in found.arrivals] == [((0,), 512), ((0, 46), 512)]


def test_a_batch_is_measured_in_bytes():
    """4 bytes a token rounded up, ids counted, bounds taken as outputs, and the header says so."""
    found = converted("openai-batch", BATCH)

    assert rows(found) == [(0.0, 3, 7), (0.0, 5, 256), (0.0, 2, 2)]
    assert "prompt = bytes/4" in found.header.made_up


@pytest.mark.parametrize(
    ("extra", "expected", "made_up"),
    [
        ({"start_times": [100.0, 100.5, 102.0]}, [0.0, 2.0], "nothing"),
        ({"request_rate": 2.0}, [0.0, 1.0], "arrivals, even at the request rate"),
        ({"request_rate": "inf"}, [0.0, 0.0], "arrivals, all at 0"),
    ],
)
def test_a_benchmark_result_is_replayed(extra, expected, made_up):
    """Failed requests (no output) are left out; moments as good as the file has them."""
    result = {"date": "x", "input_lens": [5, 6, 7], "output_lens": [1, 0, 3], "ttfts": []}

    found = converted("vllm-bench", json.dumps(result | extra).encode())

    assert rows(found) == [(expected[0], 5, 1), (expected[1], 7, 3)]
    assert found.header.made_up == made_up


def test_a_csv_may_have_its_columns_anywhere():
    """Names decide, not places."""
    found = converted("csv", b"\xef\xbb\xbfoutput,user,arrival,prompt\n3,u,10.5,7\n1,v,10.0,9\n")

    assert rows(found) == [(0.0, 9, 1), (0.5, 7, 3)]


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("azure", b"TIMESTAMP,Context\n", "line 1: columns are .* wanted 'ContextTokens'"),
        ("azure", AZURE + b"now,1,1\n", "line 4: TIMESTAMP: moment is b'now'"),
        ("azure", AZURE + b"2023-13-01,1,1\n", "line 4: TIMESTAMP: "),
        ("azure", AZURE + b"NaT,1,1\n", "line 4: TIMESTAMP: moment is b'NaT'"),
        ("csv", b"arrival,prompt,output\nnan,1,1\n", "line 2: arrival: moment is nan"),
        ("csv", b"arrival,prompt,output\n1,1\n", "line 2: 2 columns, wanted at least 3"),
        ("mooncake", b'{"timestamp": 1, "input_length": 0, "output_length": 5}\n', "line 1: 0 pr"),
        ("mooncake", MOONCAKE + b"[]\n", "line 3: '\\[\\]': Expected `object`"),
        ("openai-batch", b'{"body":{"messages":[]}}\n', "line 1: 0 prompt and 256 output"),
        ("openai-batch", b'{"id":"a"}\n', "line 1: .*missing required field `body`"),
        ("vllm-bench", b'{"input_lens":[1],"output_lens":[]}', "line 1: 1 input_lens and 0"),
        ("vllm-bench", b'{"mean_ttft_ms":3}', "line 1: .*missing required field `input_lens`"),
    ],
)
def test_a_wrong_line_is_named(kind, data, message):
    """File, line, found and wanted stand in every error."""
    with pytest.raises(TraceError, match=f"file, {message}"):
        converted(kind, data)
