"""An engine's /metrics: taken where present, unknown where absent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.scrape import Load, parse

PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:prefix_cache_queries_total{engine="0"} 100.0
vllm:prefix_cache_queries_created{engine="0"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0"} 40.0
vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",sleep_state="discard_all"} 0.0
"""


def test_what_is_there_is_read():
    """Load, capacity and the prefix counters; `_created` is no counter."""
    assert parse(PAGE) == Load(
        running=3,
        queued=2,
        kv_usage=0.25,
        block_tokens=16,
        kv_tokens=16_000,
        prefix_queries=100.0,
        prefix_hits=40.0,
    )


def test_two_engines_behind_one_server_are_added():
    """Data parallel: requests and blocks add up, usage is the mean."""
    other = PAGE.replace(b'engine="0"', b'engine="1"').replace(b" 0.25", b" 0.75")

    found = parse(PAGE + other)

    assert (found.running, found.kv_tokens, found.kv_usage) == (6, 32_000, 0.5)


def test_the_engines_own_size_wins():
    """Hybrid models' blocks do not multiply out."""
    page = PAGE.replace(
        b'num_gpu_blocks="1000"', b'kv_cache_size_tokens="9000",num_gpu_blocks="1000"'
    )

    assert parse(page).kv_tokens == 9000


def test_the_older_name_will_do():
    """`gpu_cache_usage_perc` until vLLM 0.10."""
    assert parse(PAGE.replace(b"vllm:kv_cache", b"vllm:gpu_cache")).kv_usage == 0.25


@pytest.mark.parametrize(("said", "expected"), [("True", False), ("False", True), ("None", False)])
def test_an_engine_without_prefix_cache_is_seen(said, expected):
    """It says so itself; whoever says nothing is believed to have one, as vLLM does unless told otherwise."""
    page = PAGE.replace(
        b'engine="0",num', f'enable_prefix_caching="{said}",engine="0",num'.encode()
    )

    assert parse(page).no_prefix_cache is expected
    assert not parse(PAGE).no_prefix_cache


def test_asleep_is_seen():
    """/health would not tell."""
    page = PAGE.replace(b'"awake"} 1.0', b'"awake"} 0.0')

    assert parse(page).is_asleep


@pytest.mark.parametrize(
    "page", [b"", b"# nothing", b'vllm:cache_config_info{num_gpu_blocks="None"} 1.0\n']
)
def test_absence_is_tolerated(page):
    """Whatever is missing stays unknown."""
    assert parse(page) == Load()


@given(
    st.binary(max_size=300)
    | st.text("0.eE+-", min_size=1).map(lambda n: f"vllm:num_requests_running {n}\n".encode())
)
def test_no_page_breaks_it(page):
    """Not even one that is none."""
    parse(page)


@pytest.mark.parametrize(
    "value", ["1e308", "-1e308", "9" * 400, "-3", "NaN", "1e999", "99999999999999999999"]
)
def test_numbers_that_cannot_be_are_bounded(value):
    """Whatever they are, and however often they come: what is told of them is a number that others can read."""
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    info = f'vllm:cache_config_info{{num_gpu_blocks="{value}",block_size="{value}"}} 1.0\n'
    page = "".join(f"vllm:{name} {value}\n" for name in gauges) + info

    load = parse(page.encode() * 300)

    assert 0 <= load.kv_usage <= 1
    for count in (load.running, load.queued, load.kv_tokens, load.block_tokens):
        assert 0 <= count <= 2**53


def test_a_label_may_hold_a_brace():
    """As a model's name may."""
    assert parse(b'vllm:num_requests_running{model_name="a}b{c"} 3\n').running == 3


def test_labels_without_end_are_read_once():
    """Names of a million letters, read again from each of them, would take days."""
    long = b"a" * 1_000_000

    parse(b"vllm:cache_config_info{" + long + b'="' + long + b"} 1.0\n")
