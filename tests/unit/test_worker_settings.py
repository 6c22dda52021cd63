"""How a worker is told of its engines: tables in the file, NAME=URL on the command line."""

import pytest

from scheduler.errors import SettingsError
from scheduler.parsing import parse
from scheduler.settings import RedisSettings, Settings
from workers.worker import Worker, address, with_engines

TWO = """
[[worker.engines]]
name = "a0"
url = "http://127.0.0.1:8000"
hardware = "a100"
roles = ["prefill", "decode"]

[[worker.engines]]
name = "a1"
url = "http://127.0.0.1:8001"
"""


def test_engines_are_tables_of_the_file():
    """One table an engine; what is left out is asked of the engine."""
    first, second = parse(TWO, {}).worker.engines

    assert (first.name, first.hardware, first.roles) == ("a0", "a100", ("prefill", "decode"))
    assert (second.hardware, second.models, second.max_model_len) == ("", (), 0)


def test_a_name_stands_once():
    """Two engines under one name would fence each other for ever."""
    with pytest.raises(SettingsError, match="'a0' twice"):
        parse(TWO.replace('"a1"', '"a0"'), {})


def test_the_command_line_replaces_the_files_engines():
    """NAME=URL, then more of its settings; lists with a plus between."""
    told = with_engines(
        parse(TWO, {}), ["b0=http://h:1,max_num_seqs=8,models=m1+m2,by_priority=true"]
    )

    [engine] = told.worker.engines
    assert (engine.name, engine.url, engine.max_num_seqs) == ("b0", "http://h:1", 8)
    assert (engine.models, engine.by_priority) == (("m1", "m2"), True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a0",
        "=http://h:1",
        "a 0=http://h:1",
        "a0=http://h:1,hardware",
        "a0=http://h:1,seats=4",
        "a0=http://h:1,max_num_seqs=0",
    ],
)
def test_what_is_no_engine_is_named(text):
    """The message shows what was said."""
    with pytest.raises(SettingsError, match="engine is"):
        address(text)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", "http://h:port"])
def test_a_url_is_checked_before_anything_starts(url):
    """An engine that is away is no error; one that can never be found is."""
    told = with_engines(Settings(redis=RedisSettings(url="redis://h")), [f"a0={url}"])

    with pytest.raises(SettingsError, match="url of engine 'a0'"):
        Worker(told)


def test_a_worker_needs_engines_and_a_redis():
    """Each is said by its setting's name."""
    with pytest.raises(SettingsError, match=r"worker\.engines is empty"):
        Worker(Settings())
    with pytest.raises(SettingsError, match=r"redis\.url is empty"):
        Worker(parse(TWO, {}))
