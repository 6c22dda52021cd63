"""The emulated text is one text, wherever it is broken off and taken up again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.emulator.text import MEAN_TOKENS, TOKEN_BYTES, Context, ids_of, render_chat

TEXTS = st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"), max_size=40)
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)


@given(prompt=TEXTS, n_tokens=st.integers(1, 40), data=st.data())
def test_a_text_goes_on_from_anywhere(prompt, n_tokens, data):
    """Prompt plus the first words says exactly the rest, and counts as many tokens more."""
    whole = Context.of_text(prompt).say(n_tokens)
    cut = data.draw(st.integers(0, n_tokens))

    said = b"".join(whole[:cut]).decode()
    rest = Context.of_text(prompt + said)

    assert rest.say(n_tokens - cut) == whole[cut:]
    assert rest.n_tokens == Context.of_text(prompt).n_tokens + cut


@given(ids=IDS, n_tokens=st.integers(1, 30), data=st.data())
def test_ids_go_on_as_text_does(ids, n_tokens, data):
    """The ids a client was given continue its prompt's ids."""
    whole = Context.of_ids(ids).say(n_tokens)
    cut = data.draw(st.integers(0, n_tokens))

    rest = Context.of_ids(ids + ids_of(b"".join(whole[:cut])))

    assert rest.say(n_tokens - cut) == whole[cut:]


@given(prompt=TEXTS)
def test_a_text_and_its_ids_are_one_prompt(prompt):
    """What `return_token_ids` shows of a text prompt may be sent in its place."""
    text = Context.of_text(prompt)

    ids = Context.of_ids(text.ids)

    assert ids.say(5) == text.say(5)
    assert ids.n_tokens == text.n_tokens == -(-len(prompt.encode()) // TOKEN_BYTES)


@given(prompt=TEXTS, data=st.data())
@settings(max_examples=40)
def test_its_own_end_comes_at_the_same_word(prompt, data):
    """The whole text's length is the first part's plus the rest's."""
    whole, ended = Context.of_text(prompt).say_until_end(0, 50 * MEAN_TOKENS)
    assert ended
    cut = data.draw(st.integers(0, len(whole) - 1))

    said = b"".join(whole[:cut]).decode()
    rest, ended = Context.of_text(prompt + said).say_until_end(0, 50 * MEAN_TOKENS)

    assert ended
    assert rest == whole[cut:]


MESSAGES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=4)


@given(messages=MESSAGES, n_tokens=st.integers(1, 30), data=st.data())
def test_an_answer_left_open_goes_on(messages, n_tokens, data):
    """`continue_final_message` with the first words says exactly the rest."""
    opened = render_chat(messages, opens_answer=True, leaves_open=False)
    whole = Context.of_text(opened).say(n_tokens)
    cut = data.draw(st.integers(0, n_tokens))

    said = b"".join(whole[:cut]).decode()
    going_on = render_chat([*messages, ("assistant", said)], opens_answer=False, leaves_open=True)

    assert Context.of_text(going_on).say(n_tokens - cut) == whole[cut:]


@given(messages=MESSAGES, answer=TEXTS, question=TEXTS)
def test_a_conversation_begins_with_its_earlier_turns(messages, answer, question):
    """Whole tokens of one turn are the first tokens of the next: a prefix cache can see it."""
    turn = Context.of_text(render_chat(messages, opens_answer=False, leaves_open=False))
    later = [*messages, ("assistant", answer), ("user", question)]

    longer = Context.of_text(render_chat(later, opens_answer=True, leaves_open=False))

    assert longer.ids[: turn.n_tokens] == turn.ids


@given(shared=st.lists(st.integers(1, 2**32 - 1), min_size=8, max_size=24), salt=TEXTS)
def test_keys_are_equal_exactly_over_the_shared_prefix(shared, salt):
    """A block's key stands for all before it, and for the tenant's salt."""
    block = 4
    one = Context.of_ids([*shared, 1]).keys([], block, "")
    other = Context.of_ids([shared[0] - 1, *shared[1:], 1]).keys([], block, "")
    longer = Context.of_ids([*shared, 2, 3, 4, 5]).keys([], block, "")
    salted = Context.of_ids([*shared, 1]).keys([], block, f"x{salt}")

    n_shared = len(shared) // block
    assert longer[:n_shared] == one[:n_shared]
    assert not set(one) & set(other)
    assert not set(one) & set(salted)
