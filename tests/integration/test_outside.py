"""The official `openai` client at a door before emulated engines; tests/vllm asks the same before real ones."""

import pytest
from outside import Facts
from stacks import up

pytestmark = pytest.mark.xdist_group("outside")  # one system for all of them


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """`headgate up` with two emulated engines."""
    with up(tmp_path_factory.mktemp("up"), "--emulate", "2", "--profiles", "h100") as ready:
        yield ready


class TestOpenAI(Facts):
    """Every fact of `outside`."""
