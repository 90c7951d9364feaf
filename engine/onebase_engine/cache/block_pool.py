"""Bookkeeping of the paged cache: which block is whose, and which holds a prefix that another can reuse.

Invariant: every block is in exactly one state, so `free + cached + used == total` always. `used` blocks have
references; `cached` ones have none but keep a known prefix, least recently used first; `free` hold nothing.
A full block is known by a hash over its tokens, all tokens before it, and a salt (adapter and tenant), so
sequences of different adapters or tenants never share.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from onebase_engine.cache.prefix_hash import BlockHash


class BlockPool:
    """`total` blocks of `block_size` tokens."""

    def __init__(self, total: int, block_size: int, *, reuse: bool = True) -> None:
        self.total = total
        self.block_size = block_size
        self._reuse = reuse
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, BlockHash] = OrderedDict()
        self._references: dict[int, int] = {}
        self._by_hash: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return len(self._references)

    @property
    def available(self) -> int:
        """Blocks that can be had now: free ones, and cached ones that would be forgotten."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def find_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks that hold the longest known run from the start of `hashes`. Takes no references."""
        found = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody uses: taking them lowers `available` by so many."""
        return sum(block in self._cached for block in blocks)

    def take(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of some used or cached blocks."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
            self._references[block] = self._references.get(block, 0) + 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the least recently used cached ones go first when no free
        ones are left. The caller has checked `available`: otherwise MemoryError, and nothing is taken."""
        if count > self.available:
            raise MemoryError(f"{count} cache blocks wanted, {self.available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, digest = self._cached.popitem(last=False)
                del self._by_hash[digest], self._hash_of[block]
            self._references[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, digest: BlockHash) -> None:
        """Say that a used block is full and computed, so that others may reuse it. If an equal block is known
        already, that one stays the known one."""
        if self._reuse and digest not in self._by_hash and block not in self._hash_of:
            self._by_hash[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each. Later blocks of a sequence are forgotten before earlier ones, because a
        prefix is of no use without its beginning."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            if left:
                self._references[block] = left
                continue
            del self._references[block]
            digest = self._hash_of.get(block)
            if digest is None:
                self._free.append(block)
            else:
                self._cached[block] = digest

    def faults(self, held: Iterable[int]) -> list[str]:
        """Contradictions, if `held` are all blocks that sequences hold, each as often as they do."""
        found = []
        if Counter(held) != self._references:
            found.append("the pages that sequences hold are not those that have references")
        states = [*self._free, *self._cached, *self._references]
        if sorted(states) != list(range(self.total)):
            found.append("a page is in no state, or in two")
        known = {block: digest for digest, block in self._by_hash.items()}
        if known != self._hash_of or not self._cached.items() <= known.items():
            found.append("known prefixes and their pages do not belong together")
        return found

    def forget(self) -> None:
        """Drop all cached prefixes that nobody uses."""
        for block, digest in self._cached.items():
            del self._by_hash[digest], self._hash_of[block]
            self._free.append(block)
        self._cached.clear()
