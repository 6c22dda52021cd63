"""What a client says of a prompt that it has not tokenised."""

import pytest

from dispatcher.client import prompt as prompts
from dispatcher.client.client import Client
from dispatcher.client.prompt import MEDIA_TOKENS


def chat(*parts: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


def picture(pixels: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixels}"}}


class TestPictures:
    @pytest.mark.parametrize(
        "part",
        [
            pytest.param(picture("A" * 3_000_000), id="a photograph of 3 MB"),
            pytest.param(picture("A"), id="one of a byte"),
            pytest.param({"type": "image_url", "image_url": {"url": "http://x/y.png"}}, id="a URL"),
            pytest.param({"image_url": "http://x/y.png"}, id="without a type"),
            pytest.param(
                {"type": "input_audio", "input_audio": {"data": "A" * 500_000, "format": "wav"}},
                id="a sound",
            ),
        ],
    )
    def test_each_counts_alike_whatever_its_bytes(self, part):
        """By its bytes a photograph would be longer than every context, and be refused."""
        without = prompts.length(prompts.prompt(chat(text("what?"))))

        tokens = prompts.length(prompts.prompt(chat(text("what?"), part)))

        assert MEDIA_TOKENS <= tokens - without <= MEDIA_TOKENS + 2

    def test_the_same_one_is_the_same_prefix_and_another_another(self):
        """An engine keeps the KV of a picture that it has seen."""
        one, same, other = (
            prompts.prompt(chat(picture(pixels), text("what?"))) for pixels in ("A", "A", "B")
        )

        assert one == same
        assert one[:100] != other[:100]


class TestRequest:
    @pytest.mark.parametrize("messages", [5, "hi", {"role": "user"}, [5], None])
    def test_what_is_no_conversation_is_left_to_the_engine(self, messages):
        """It says what it wants; a client that fails over it says nothing."""
        request = Client(redis="redis://127.0.0.1:1").request({"model": "m", "messages": messages})

        assert request.prompt_tokens == 1

    @pytest.mark.parametrize(
        ("body", "is_guess"),
        [
            ({"model": "m", "prompt": "the river"}, True),
            ({"model": "m", "prompt": [1, 2, 3]}, False),
        ],
    )
    def test_says_whether_its_length_was_counted(self, body, is_guess):
        """What is only guessed ends nobody's request."""
        request = Client(redis="redis://127.0.0.1:1").request(body)

        assert request.prompt_estimated is is_guess

    def test_a_tokenizer_counts(self):
        """Then a length above every context is the client's own word."""
        client = Client(redis="redis://127.0.0.1:1", tokenizer=lambda words: list(words.encode()))

        request = client.request({"model": "m", "prompt": "the river"})

        assert (request.prompt_tokens, request.prompt_estimated) == (9, False)
        assert client.request(chat(text("what?"), picture("A"))).prompt_estimated
