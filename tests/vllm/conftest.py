"""One home for all fleets of a run, so that the models are made once, and what each module plays on."""

import json
import signal
import subprocess

import msgspec
import pytest
from fleets import HEADGATE, ended, started
from tied import tied

from workers.fleet.cli import option
from workers.fleet.pod import Pod


@pytest.fixture(scope="session")
def fleet_home(tmp_path_factory):
    """Models, logs and caches."""
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def endpoints(fleet_home, request):
    """The servers that the module asks for, by their names: its `FLEET` is what follows `headgate fleet up`."""
    process, found = started(fleet_home, *request.module.FLEET)
    yield {one["name"]: one for one in found}
    ended(process)


@pytest.fixture(scope="module")
def system(endpoints, tmp_path_factory):
    """Private Redis, dispatchers, worker and door before them: the ready line of `headgate up`."""
    engines = [f"--engine={option(msgspec.convert(one, Pod))}" for one in endpoints.values()]
    process = subprocess.Popen(
        tied(HEADGATE, "up", *engines, "--json", "--directory", tmp_path_factory.mktemp("up")),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = process.stdout.readline()
    assert line, "the system did not start"
    yield json.loads(line)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
