"""Tokens without a tokeniser, text without a model.

A token is four bytes of UTF-8, and its id is those bytes as a little-endian number, so
text and ids turn into each other. The next token is a function of everything before it: a
checksum of all bytes so far picks one of 17,576 four-byte words, and also says whether the
text ends there. So a text can be broken off anywhere and continued elsewhere, from its
prompt and what was already said, and comes out the same to the last word.
"""

from hashlib import blake2b
from itertools import product
from string import ascii_lowercase
from zlib import crc32

import numpy as np

TOKEN_BYTES = 4

WORDS = [f" {''.join(letters)}".encode() for letters in product(ascii_lowercase, repeat=3)]
"All words an answer is made of: a space and three letters, one token each."

MEAN_TOKENS = 200
"Mean length of an answer that nothing else limits; near that of public chat traces."

_MAX_ID = 2**32 - 1


class Context:
    """Everything said so far, as the engine holds it.

    >>> Context.of_text("hello").n_tokens
    2
    >>> Context.of_ids([7, 8, 9]).n_tokens
    3
    """

    __slots__ = ("_data", "_state")

    def __init__(self, data: bytes) -> None:
        self._data = data  # four bytes a token; the last piece of a text padded with zeros
        # Zeros are left out, so that padding does not change what is said next.
        self._state = crc32(data.replace(b"\0", b""))

    @classmethod
    def of_text(cls, text: str) -> "Context":
        raw = text.encode("utf-8", "surrogatepass")
        return cls(raw + bytes(-len(raw) % TOKEN_BYTES))

    @classmethod
    def of_ids(cls, ids: list[int]) -> "Context":
        """A context of token ids.

        Raises:
            ValueError: an id is not a 32-bit number.
        """
        if ids and (min(ids) < 0 or max(ids) > _MAX_ID):
            raise ValueError(f"token ids run from {min(ids)} to {max(ids)}, 0 to {_MAX_ID} wanted")
        return cls(np.array(ids, "<u4").tobytes())

    @property
    def n_tokens(self) -> int:
        return len(self._data) // TOKEN_BYTES

    @property
    def ids(self) -> list[int]:
        return ids_of(self._data)

    def say(self, n_tokens: int) -> list[bytes]:
        """The next `n_tokens` words."""
        state, words = self._state, []
        for _ in range(n_tokens):
            word = WORDS[state % len(WORDS)]
            words.append(word)
            state = crc32(word, state)
        return words

    def say_until_end(self, at_least: int, at_most: int) -> tuple[list[bytes], bool]:
        """The words up to where the text ends by itself, and whether it came to that.

        The end depends on the checksum alone, not on how many words were said: lengths are
        geometric, the one law under which a continued text ends where the whole would have.
        """
        words: list[bytes] = []
        state = self._state
        while len(words) < at_most:
            word = WORDS[state % len(WORDS)]
            words.append(word)
            state = crc32(word, state)
            # The low bits have chosen the word; these are others.
            if (state >> 15) % MEAN_TOKENS == 0 and len(words) >= at_least:
                return words, True
        return words, False

    def data(self, words: list[bytes]) -> bytes:
        """The context and the words that follow it, four bytes a token."""
        return self._data + b"".join(words)

    def keys(self, words: list[bytes], block_size: int, salt: str) -> list[int]:
        """Chained keys of all full blocks of the context and the words that follow it."""
        data = self.data(words)
        width = block_size * TOKEN_BYTES
        digest = salt.encode()
        keys = []
        for start in range(0, len(data) - width + 1, width):
            digest = blake2b(digest + data[start : start + width], digest_size=8).digest()
            keys.append(int.from_bytes(digest, "little"))
        return keys


def ids_of(data: bytes) -> list[int]:
    """The token ids of bytes that are whole tokens."""
    ids: list[int] = np.frombuffer(data, "<u4").tolist()
    return ids


def render_chat(messages: list[tuple[str, str]], *, opens_answer: bool, leaves_open: bool) -> str:
    """One fixed chat template.

    Every part is padded to whole tokens, so that a conversation's next turn begins with
    exactly the tokens of this one, and a continued answer with those of its first part.

    Args:
        messages: (role, content) pairs.
        opens_answer: `add_generation_prompt`: end with the head of an assistant's message.
        leaves_open: `continue_final_message`: end with the last content, unclosed.
    """
    parts = []
    for role, content in messages:
        parts.append(_padded(f"<|{role}|>"))
        parts.append(_padded(content))
    if leaves_open and messages:
        parts[-1] = messages[-1][1]
    if opens_answer:
        parts.append(_padded("<|assistant|>"))
    return "".join(parts)


def _padded(part: str) -> str:
    """With one to four newlines behind it, so that it is whole tokens and visibly closed."""
    size = len(part.encode("utf-8", "surrogatepass"))
    return part + "\n" * (TOKEN_BYTES - size % TOKEN_BYTES)
