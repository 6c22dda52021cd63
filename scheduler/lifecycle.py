"""A request's life as one table: which transition leads from which state to which.

    queued --read--> waiting <--set_aside, take_up--> set_aside
                      |   ^                               |
               assign |   | reclaim, hand_back            | assign
                      v   |                               |
                     assigned <---------------------------+
                      | start
                      v
                     running             and from every state: finish --> terminal

Where prompts are computed apart, a `prefill` leg ends with `hand_over`: the request is `prefilled` until its `decode`
leg is assigned, or waits again where its KV is lost (`lose`).

`queued` is seen in Redis only: nobody has read the entry yet. Setting aside is reversible, finishing is not.
Any pair that is not in the table is a bug of ours and raises `AssertionError`.
"""

from typing import Literal

State = Literal["queued", "waiting", "set_aside", "assigned", "running", "prefilled", "terminal"]
Transition = Literal[
    "read",  # the dispatcher has it
    "set_aside",  # cannot make it on the present prediction; tested again at every step
    "take_up",  # it can after all
    "assign",  # handed over to an endpoint's stream
    "start",  # admitted to the engine
    "hand_back",  # the worker returns it: engine trouble or a drain
    "reclaim",  # the worker's lease ran out
    "hand_over",  # its prompt is computed, and its KV waits for an endpoint that decodes
    "lose",  # that KV is gone
    "finish",  # the one terminal record is written
]

NEXT: dict[tuple[State, Transition], State] = {
    ("queued", "read"): "waiting",
    ("queued", "finish"): "terminal",
    ("waiting", "set_aside"): "set_aside",
    ("waiting", "assign"): "assigned",
    ("waiting", "finish"): "terminal",
    ("set_aside", "take_up"): "waiting",
    ("set_aside", "assign"): "assigned",
    ("set_aside", "finish"): "terminal",
    ("assigned", "start"): "running",
    ("assigned", "hand_back"): "waiting",
    ("assigned", "reclaim"): "waiting",
    ("assigned", "finish"): "terminal",
    ("running", "hand_back"): "waiting",
    ("running", "reclaim"): "waiting",
    ("running", "finish"): "terminal",
    ("assigned", "hand_over"): "prefilled",
    ("running", "hand_over"): "prefilled",
    ("prefilled", "assign"): "assigned",
    ("prefilled", "lose"): "waiting",
    ("prefilled", "finish"): "terminal",
}


def after(state: State, transition: Transition) -> State:
    """The state that this transition leads to.

    >>> after("assigned", "reclaim")
    'waiting'
    """
    assert (state, transition) in NEXT, f"no transition {transition!r} from state {state!r}"
    return NEXT[state, transition]
