"""A policy's `seats`: its engines' `max_num_seqs`, set by hand as whoever runs it would."""

import pytest
from msgspec import structs

from scheduler.errors import SettingsError
from scheduler.sim import catalogue, policy
from scheduler.sim.fleet import EndpointSpec, Fleet
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Promised
from scheduler.sim.workload import Arrival

PARTED = catalogue.named("pd-a100x4-a100x4")
WHOLE = Fleet(name="one", endpoints=(EndpointSpec(profile="a100"),))


def lab(found):
    arrivals = [Arrival(at_s=at / 40, prompt_tokens=200, output_tokens=60) for at in range(80)]
    return Lab(fleet=found, work=Promised(tuple(arrivals)), trace="test")


def run(found, label):
    return lab(found).run(policy.named(label), label=label, seed=0, rate_rps=40.0)


@pytest.mark.parametrize("name", ["plan", "kairos", "edf-drop", "least-request"])
def test_so_many_decode_together_and_no_more(name):
    """At any moment, whoever binds and whoever admits; with the fleet's own flags there are more."""
    report, held = run(WHOLE, f"{name}:seats=7")
    _, free = run(WHOLE, name)

    assert max(moment[1] for moment in held.timeline) == 7
    assert max(moment[1] for moment in free.timeline) > 7
    assert report.n_completed == report.n


def test_parted_fleets_are_set_where_they_decode():
    """Prompts are computed as before: what is set is how many answers share a step."""
    _, world = run(PARTED, "fcfs:seats=3")

    seats = {name: one.engine.settings.max_num_seqs for name, one in world.endpoints.items()}
    assert {seats[f"a100-decode-{at}"] for at in range(4)} == {3}
    assert {seats[f"a100-prefill-{at}"] for at in range(4)} == {256}


def test_the_load_is_of_the_fleet_as_it_stands():
    """A policy's own seats leave machines and capacity as they are for all others."""
    stage = lab(WHOLE)
    before = stage.capacity_rps(0)
    stage.run(policy.named("fcfs:seats=2"), label="", seed=0, rate_rps=1.0)

    assert stage.capacity_rps(0) == before


def test_seats_that_cannot_be_say_what_can():
    with pytest.raises(SettingsError, match=r"seats=0.*>= 1"):
        policy.named("fcfs:seats=0")
    few = structs.replace(
        WHOLE,
        endpoints=(*WHOLE.endpoints, EndpointSpec(profile="h100", engine=catalogue.H100_ENGINE)),
    )
    with pytest.raises(SettingsError, match=r"'plan' has seats 257, wanted at most 256, .* one"):
        lab(few).admit(policy.named("plan:seats=257"))
