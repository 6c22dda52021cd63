"""Which engine the suite meets: the emulator, or with --engine vllm real servers."""

import asyncio
from pathlib import Path

import pytest
from engines import Emulated, Real

VENV = Path(__file__).parents[2] / ".venv-vllm"


@pytest.fixture(scope="session")
def engine(request, tmp_path_factory):
    """Makes servers: `async with engine(max_num_seqs=4) as server`."""
    if request.config.getoption("--engine") == "emulator":
        yield Emulated()
        return
    real = Real(tmp_path_factory.mktemp("fleet"), VENV)
    yield real
    asyncio.run(real.end())


@pytest.fixture
async def server(engine):
    """A server with priorities and four seats."""
    async with engine() as one:
        yield one
