"""One home for all fleets of a run, so that the models are made once."""

import pytest


@pytest.fixture(scope="session")
def fleet_home(tmp_path_factory):
    """Models, logs and caches."""
    return tmp_path_factory.mktemp("fleet")
