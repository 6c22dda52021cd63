"""`headgate trace`: public traces come whole or not at all, and what is written can be read."""

import gzip
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from dispatcher.cli import download, trace
from dispatcher.cli.download import DownloadError, FileError
from scheduler.errors import HeadgateError
from scheduler.sim.trace import read

AZURE = b"""\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
MOONCAKE = b'{"timestamp": 0, "input_length": 600, "output_length": 52, "hash_ids": [0, 46]}\n'


@contextmanager
def served(body, status=200, promised=None):
    """A server on loopback that answers every GET with this body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if promised is None else promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/file"
        finally:
            server.shutdown()
            thread.join()


def run(*words):
    return CliRunner().invoke(trace.app, ["trace", *map(str, words)])


def rows(path):
    with path.open("rb") as file:
        return read(file, name=path.name)


class TestGet:
    @pytest.mark.parametrize(
        ("name", "body", "expected"),
        [
            ("azure23-code", AZURE, [(0.0, 4808, 10), (0.052, 3180, 8)]),
            ("azure23-code", gzip.compress(AZURE), [(0.0, 4808, 10), (0.052, 3180, 8)]),
        ],
        ids=["azure", "a packed copy"],
    )
    def test_a_public_trace_arrives_in_our_format(self, tmp_path, name, body, expected):
        """What the authors serve is converted, and the header says whose it is."""
        out = tmp_path / "got.jsonl.gz"
        with served(body) as url:
            result = run("get", name, "--url", url, "--out", out)

        assert result.exit_code == 0, result.output
        found = rows(out)
        assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in found.arrivals] == expected
        assert (found.header.trace, found.header.source) == (name, url)
        assert found.header.licence == trace.SOURCES[name].licence

    def test_mooncake_rows_are_spread_inside_their_tick(self, tmp_path):
        """Its clock ticks every 3 s; rows move inside, keep their blocks, and the header says so."""
        outs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        with served(MOONCAKE * 20) as url:
            for out in outs:
                run("get", "mooncake-conv", "--url", url, "--out", out)

        one, again = (rows(out) for out in outs)
        at_s = [a.at_s for a in one.arrivals]
        assert one.arrivals == again.arrivals
        assert len(set(at_s)) == 20
        assert 0 <= min(at_s) <= max(at_s) < 3
        assert {a.blocks for a in one.arrivals} == {(0, 46)}
        assert "moment inside each 3 s tick" in one.header.made_up

    @pytest.mark.parametrize(
        ("body", "answer", "message"),
        [
            pytest.param(b"gone", {"status": 404}, "answered 404", id="not found"),
            pytest.param(AZURE, {"promised": 999}, "sent 111 bytes and had promised 999", id="cut"),
            pytest.param(b"<html>\n", {}, "line 1: columns are", id="another page"),
            pytest.param(AZURE[:40], {}, "holds no request", id="only a head"),
            pytest.param(b"x" * 2000, {}, "longer than the limit of 1000 bytes", id="endless"),
        ],
    )
    def test_a_bad_answer_leaves_the_old_file_alone(
        self, tmp_path, monkeypatch, body, answer, message
    ):
        """One clear error; the file that was there stays, and no scraps beside it."""
        monkeypatch.setattr(download, "BYTES_MAX", 1000)
        out = tmp_path / "got.jsonl"
        out.write_text("old")
        with served(body, **answer) as url:
            result = run("get", "azure23-conv", "--url", url, "--out", out)

        assert isinstance(result.exception, HeadgateError)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("got.jsonl", "old")]

    def test_offline_says_what_to_do(self, tmp_path):
        """Nobody listens: one line with the address and the way out."""
        with served(b"") as url:
            pass
        result = run("get", "azure23-conv", "--url", url, "--out", tmp_path / "x")

        assert isinstance(result.exception, DownloadError)
        assert "Connection refused; without the internet, name a copy with --url" in str(
            result.exception
        )

    def test_only_the_web_is_read(self, tmp_path):
        """A file address would read what lies on this machine."""
        result = run("get", "azure23-conv", "--url", "file:///etc/hosts", "--out", tmp_path / "x")

        assert "wanted one that starts with http:// or https://" in str(result.exception)

    def test_an_unknown_name_lists_the_known(self):
        """A wrong name is a wrong option."""
        result = run("get", "nope")

        assert result.exit_code == 2
        assert "azure23-conv" in result.output


def test_a_failure_while_writing_leaves_no_scraps(tmp_path):
    """Half a file never takes the name, nor does it stay beside it."""
    out = tmp_path / "x.jsonl"

    with pytest.raises(TypeError), download.replacing(out) as file:
        file.writelines([b"half", "no bytes"])

    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    """A link goes on pointing where it did; a pipe gets what is written, and stays a pipe."""
    here, there, pipe = (tmp_path / name for name in ("here", "there", "pipe"))
    here.symlink_to(there)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)

    for path in (here, pipe):
        with download.replacing(path) as file:
            file.write(b"figures")

    assert (here.is_symlink(), there.read_bytes()) == (True, b"figures")
    assert (pipe.is_fifo(), os.read(reader, 100)) == (True, b"figures")
    os.close(reader)


class TestMake:
    def test_same_seed_same_file(self, tmp_path):
        """I6: two packed files of one seed are equal byte for byte."""
        outs = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl.gz")]
        for out, seed in zip(outs, (7, 7, 8), strict=True):
            assert run("make", "--duration", 30, "--seed", seed, "--out", out).exit_code == 0

        one, again, other = (out.read_bytes() for out in outs)
        assert one == again != other

    def test_rate_and_crowd_reach_the_workload(self, tmp_path):
        """Ten times the rate of the mix, and most of it inside the crowd."""
        out = tmp_path / "made.jsonl"
        run("make", "--duration", 40, "--rate", 43, "--crowd", "10:20:9", "--out", out)

        at_s = [a.at_s for a in rows(out).arrivals]
        inside = sum(10 <= at < 20 for at in at_s)
        assert len(at_s) > 43 * 40
        assert inside > len(at_s) / 2

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--rate", 0), "wanted both above 0"),
            (("--duration", -1), "duration is -1.0 s"),
            (("--crowd", "soon"), "START:END:TIMES"),
            (("--crowd", "9:8:2"), "is no crowd"),
            (("--mix", "nope"), "wanted one of demo"),
        ],
    )
    def test_what_cannot_be_is_a_wrong_option(self, tmp_path, words, message):
        """Exit code 2, the value found and the value wanted."""
        result = run("make", *words, "--out", tmp_path / "x.jsonl")

        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert not list(tmp_path.iterdir())


def test_convert_writes_a_trace(tmp_path):
    """A CSV of one's own becomes a trace named for its file."""
    source, out = tmp_path / "mine.csv", tmp_path / "mine.jsonl"
    source.write_text("arrival,prompt,output\n5,10,3\n6,20,4\n")

    result = run("convert", source, "--from", "csv", "--out", out)

    assert result.exit_code == 0, result.output
    assert rows(out).header.trace == "mine"
    assert [a.at_s for a in rows(out).arrivals] == [0.0, 1.0]


class TestShow:
    def test_json_is_for_programs(self, tmp_path):
        """One object with the same numbers that the table shows."""
        out = tmp_path / "made.jsonl"
        run("make", "--duration", 20, "--out", out)

        shown = json.loads(run("show", out, "--json").output)
        table = run("show", out).output

        assert shown["rows"] == len(rows(out).arrivals)
        assert sum(shown["clients"].values()) == shown["rows"]
        assert f"{shown['rows']:,}" in table
        assert f"{shown['prefix_share']:.1%}" in table

    def test_a_missing_file_is_one_line(self, tmp_path):
        """The file and the reason, no traceback."""
        result = run("show", tmp_path / "none")

        assert isinstance(result.exception, FileError)
        assert str(result.exception).endswith("none': No such file or directory")


def test_list_names_all_that_can_be_had():
    """Every public trace and every mix, with licence."""
    output = run("list").output

    assert all(name in output for name in [*trace.SOURCES, *trace.generate.MIXES])
    assert "CC-BY-4.0" in output
