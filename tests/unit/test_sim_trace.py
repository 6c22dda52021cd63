"""A trace file is read exactly or refused with its line."""

import gzip
import io

import numpy as np
import pytest

from scheduler.sim import trace
from scheduler.sim.trace import TraceError
from scheduler.sim.workload import Arrival

SMALL = b"""\
{"trace":"small","split":"dev","rows":2,"format":1,"licence":"CC0","block":4,"sessions":1}
{"t":0.5,"i":9,"o":3,"s":0,"k":1,"h":[0,1,2]}
{"t":2.0,"i":13,"o":1,"s":0,"k":2,"p":0,"g":1.5,"h":[0,1,3],"c":"61","img":1,"imgtok":5,"rr":0.5}
"""
ROWS = (
    Arrival(
        at_s=0.5, prompt_tokens=9, output_tokens=3, session=0, blocks=(0, 1, 2), block_tokens=4
    ),
    Arrival(
        at_s=2.0,
        prompt_tokens=13,
        output_tokens=1,
        session=0,
        turn=2,
        parent=0,
        gap_s=1.5,
        blocks=(0, 1, 3),
        block_tokens=4,
        client="61",
        images=1,
        image_tokens=5,
        reasoning_share=0.5,
    ),
)


def read(data, name="small.jsonl"):
    return trace.read(io.BytesIO(data), name=name)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_plain_and_gzip(pack):
    """The same rows come out of both; the header's block size reaches every row with blocks."""
    found = read(pack(SMALL))

    assert found.header.trace == "small"
    assert found.header.licence == "CC0"
    assert found.arrivals == ROWS


def test_what_is_written_is_read_back():
    """Rows survive the way through a file, promises included."""
    promised = Arrival(
        at_s=3.0, prompt_tokens=1, output_tokens=1, ttft_s=0.5, deadline_s=60.0, tenant="t"
    )
    lines = trace.written(trace.Header(trace="again"), (*ROWS, promised))

    found = read(b"".join(lines))

    assert found.header == trace.Header(trace="again", rows=3, block=4)
    assert found.arrivals == (*ROWS, promised)


def test_two_block_sizes_cannot_be_written():
    """The block size stands once in the header."""
    odd = Arrival(at_s=3.0, prompt_tokens=9, output_tokens=1, blocks=(7,), block_tokens=8)

    with pytest.raises(ValueError, match=r"block sizes \[4, 8\], wanted one"):
        list(trace.written(trace.Header(trace="odd"), (*ROWS, odd)))


HEAD = b'{"trace":"x","format":1,"block":4}\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "line 1: ''", id="empty"),
        pytest.param(b"hello\n", "line 1: 'hello' is no trace header", id="no header"),
        pytest.param(b'{"trace": "\xff"}\n', "line 1: .* is no trace header", id="no UTF-8"),
        pytest.param(b'{"x": ' + b"[" * 10_000, "line 1: .* is no trace header", id="a pit"),
        pytest.param(b'{"trace":"x","format":2}\n', "line 1: format is 2, wanted 1", id="format"),
        pytest.param(
            b'{"trace":"x","rows":3}\n{"t":0,"i":1,"o":1}\n',
            "line 1: header promises 3 rows, the file has 1",
            id="rows",
        ),
        pytest.param(HEAD + b"{nope}\n", "line 2: '{nope}'", id="not JSON"),
        pytest.param(HEAD + b'{"t":0,"i":"9","o":1}\n', r"line 2: .*Expected `int`", id="type"),
        pytest.param(HEAD + b'{"t":0,"i":1}\n', "line 2: .*missing required field `o`", id="none"),
        pytest.param(HEAD + b'{"t":0,"i":0,"o":1}\n', "line 2: i is 0, wanted", id="no prompt"),
        pytest.param(HEAD + b'{"t":0,"i":1,"o":-4}\n', "line 2: o is -4, wanted", id="output"),
        pytest.param(HEAD + b'{"t":-1,"i":1,"o":1}\n', r"line 2: t is -1\.0, wanted", id="before"),
        pytest.param(
            HEAD + b'{"t":5,"i":1,"o":1}\n\n{"t":4,"i":1,"o":1}\n',
            r"line 4: t is 4\.0, wanted at least 5\.0",
            id="out of order",
        ),
        pytest.param(HEAD + b'{"t":0,"i":1,"o":1,"p":0}\n', "line 2: p is 0, wanted", id="parent"),
        pytest.param(HEAD + b'{"t":0,"i":1,"o":1,"g":-2}\n', r"line 2: g is -2\.0", id="gap"),
        pytest.param(HEAD + b'{"t":0,"i":1,"o":1,"ttft":0}\n', r"2: ttft is 0\.0", id="promise"),
        pytest.param(
            HEAD + b'{"t":0,"i":4,"o":1,"h":[1,2]}\n', "line 2: 2 blocks of 4 for 4", id="blocks"
        ),
        pytest.param(
            b'{"trace":"x"}\n{"t":0,"i":4,"o":1,"h":[1]}\n', "line 2: h without", id="block size"
        ),
        pytest.param(gzip.compress(SMALL)[:-20], "the gzip data is broken", id="cut gzip"),
    ],
)
def test_a_wrong_line_is_named(data, message):
    """The error says file, line, the value found and the value wanted."""
    with pytest.raises(TraceError, match=f"small.jsonl, .*{message}"):
        read(data)


def test_lines_and_rows_are_bounded(monkeypatch):
    """A line too long or a row too many is refused, not read into memory."""
    with pytest.raises(TraceError, match="line 3: more rows than the limit of 1"):
        trace.read(io.BytesIO(SMALL), name="small", rows_max=1)
    monkeypatch.setattr(trace, "LINE_BYTES_MAX", 60)
    with pytest.raises(TraceError, match="line 1: longer than 60 bytes"):
        read(SMALL)


LENGTHS = b"# someone's lengths\nid,prompt,output\na,74,918\nb,1402,711\n"


def test_length_pairs_have_no_arrivals():
    """Talk and other columns are passed over; pairs stay pairs."""
    pairs = trace.lengths(io.BytesIO(gzip.compress(LENGTHS)), name="x.csv.gz")

    assert np.array_equal(pairs, [[74, 918], [1402, 711]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"output,class\n1,2\n", "line 1: columns are .*wanted 'prompt'", id="column"),
        pytest.param(LENGTHS + b"c,0,1\n", "line 5: length is '0', wanted", id="zero"),
        pytest.param(LENGTHS + b"c,1e3,1\n", "line 5: length is '1e3', wanted", id="no number"),
        pytest.param(LENGTHS + b"c,7\n", "line 5: 2 columns, wanted at least 3", id="short"),
        pytest.param(LENGTHS + b"c," + b"9" * 5000 + b",1\n", "line 5: length", id="huge"),
    ],
)
def test_a_wrong_length_is_named(data, message):
    """CSV errors carry file and line too."""
    with pytest.raises(TraceError, match=f"x.csv, {message}"):
        trace.lengths(io.BytesIO(data), name="x.csv")
