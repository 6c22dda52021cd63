"""What the engine's prefix cache holds, in the blocks of the wire, and how that is told to the dispatcher.

The engine names its blocks by hashes of its own, 16 to 128 tokens each; a request names 128 tokens by a chained hash.
Every stored block says what it holds and what it follows, so our chain is computed along the engine's: a block of ours
is there while the engine's block that ends it is, since an engine forgets tails before heads.

    engine   [a]->[b]->[c]->[d]->[e]->[f]->[g]->[h]     32 tokens each
    wire     [     1      ]     [       2       ]       1 is told with d and goes with d, 2 with h

Prompts that travel as text have other hashes on the wire than their tokens; `bind` says which belong together.
"""

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from scheduler.accounts import Teller
from scheduler.prefix import BLOCK_TOKENS, HASH_BYTES
from workers.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Hash, KvEvent

NODES_MAX = 262_144
"Engine blocks that are followed: four million tokens at 16 a block. Beyond it nothing is told."

TOKENS_MAX = 2**26
"The same in tokens, for engines whose blocks are large; four bytes each."

TOKEN_BYTES = 4
"As `scheduler.prefix` hashes a token."


class _Node(msgspec.Struct):
    """One block of the engine."""

    digest: bytes
    "Our chain's hash up to our last whole block."

    rest: bytes
    "The tokens behind that."

    depth: int
    "Tokens from the start to its end."

    names: dict[str, None]
    "Blocks of the wire that end in it."

    content: tuple[Hash | None, bytes]
    "The block before it and its own tokens, by which it is found again."


class Mirror:
    """Facts of the engine in; its `teller` has what they come to, for the dispatcher."""

    def __init__(self) -> None:
        """Nothing is known."""
        self.teller = Teller()
        self._nodes: dict[Hash, _Node] = {}
        self._by_content: dict[tuple[Hash | None, bytes], Hash] = {}
        self._block_tokens = 1
        "Of the engine's blocks."

    # From the engine.

    def hear(self, events: Iterable[KvEvent]) -> None:
        """Take in what the engine says has changed."""
        for event in events:
            match event:
                case BlockStored():
                    self._store(event)
                case BlockRemoved(hashes=hashes):
                    for name in hashes:
                        self._remove(name)
                case AllBlocksCleared():
                    self.clear(is_empty=True)

    def clear(self, *, is_empty: bool) -> None:
        """Begin anew. `is_empty`: the engine holds nothing; else it is only not known any more what it holds."""
        self._nodes.clear()
        self._by_content.clear()
        self.teller.clear(is_empty=is_empty)

    def knows(self, blocks: Sequence[str]) -> bool:
        """Whether every block is, but the last: that may end where none of the engine's does."""
        return all(map(self.teller.holds, blocks[:-1]))

    def bind(self, blocks: Sequence[str], tokens: Sequence[int], *, prompt_tokens: int) -> None:
        """These tokens are what the engine made of a prompt whose blocks on the wire are these.

        The blocks of a text are spread evenly over its tokens: each ends where its share of them does.

        Args:
            blocks: the request's, first block first.
            tokens: the prompt as the engine read it.
            prompt_tokens: its length as the blocks were cut, which for text is an estimate.
        """
        share = BLOCK_TOKENS * len(tokens) / max(prompt_tokens, BLOCK_TOKENS * len(blocks), 1)
        parent: Hash | None = None
        at = start = 0
        while at < len(blocks):
            content = (parent, _packed(tokens[start : start + self._block_tokens]))
            found = self._by_content.get(content)
            if found is None:
                return
            node, parent = self._nodes[found], found
            start = node.depth
            while at < len(blocks) and (at + 1) * share <= node.depth:
                self._name(node, blocks[at])
                at += 1

    # The engine's blocks.

    def _store(self, event: BlockStored) -> None:
        parent = self._nodes.get(event.parent) if event.parent is not None else _ROOT
        size = event.block_tokens
        if parent is None or size < 1 or len(event.token_ids) != size * len(event.hashes):
            return  # what it follows is not known: neither is what it holds
        before, self._block_tokens = event.parent, size
        for at, name in enumerate(event.hashes):
            tokens = event.token_ids[at * size : (at + 1) * size]
            node = self._nodes.get(name)
            if node is None:
                if len(self._nodes) >= min(NODES_MAX, TOKENS_MAX // size + 1):
                    return
                node = self._follow(parent, before, tokens)
                self._nodes[name] = node
                self._by_content[node.content] = name
            parent, before = node, name

    def _follow(self, parent: _Node, before: Hash | None, tokens: Sequence[int]) -> _Node:
        packed = _packed(tokens)
        raw, digest, names = parent.rest + packed, parent.digest, []
        width = BLOCK_TOKENS * TOKEN_BYTES
        whole = len(raw) - len(raw) % width
        for at in range(0, whole, width):
            share = raw[at : at + width]
            digest = hashlib.blake2b(digest + share, digest_size=HASH_BYTES).digest()
            names.append(digest.hex())
        node = _Node(digest, raw[whole:], parent.depth + len(tokens), {}, (before, packed))
        for name in names:
            self._name(node, name)
        return node

    def _name(self, node: _Node, block: str) -> None:
        if block in node.names:
            return
        node.names[block] = None
        self.teller.store(block)

    def _remove(self, name: Hash) -> None:
        node = self._nodes.pop(name, None)
        if node is None:
            return
        if self._by_content.get(node.content) == name:
            del self._by_content[node.content]
        for block in node.names:
            self.teller.remove(block)


_ROOT = _Node(b"", b"", 0, {}, (None, b""))


def _packed(tokens: Sequence[int]) -> bytes:
    """As `scheduler.prefix` packs ids."""
    return np.asarray(tokens, dtype=np.int64).astype("<u4").tobytes()
