"""The block pool: each block in exactly one state, references counted, prefixes found only where they are equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from onebase_engine.cache.block_pool import BlockPool
from onebase_engine.cache.prefix_hash import block_hashes

SIZE = 4


class PoolMachine(RuleBasedStateMachine):
    """Holders take, publish and release blocks at random; a plain count of references is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.holders: list[list[int]] = []
        self.published: dict[bytes, int] = {}

    @rule(count=st.integers(1, 7))
    def allocate(self, count: int) -> None:
        in_use = {block for holder in self.holders for block in holder}
        if count > self.pool.available:
            before = (self.pool.free, self.pool.cached, self.pool.used)
            with pytest.raises(MemoryError):
                self.pool.allocate(count)
            assert before == (self.pool.free, self.pool.cached, self.pool.used)
            return
        taken = self.pool.allocate(count)
        assert len(set(taken)) == count
        assert not in_use & set(taken), "handed out a block that is in use"
        self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), digest=st.integers(0, 4))
    def publish(self, data: st.DataObject, digest: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        block = data.draw(st.sampled_from(holder))
        self.pool.publish(block, b"%d" % digest)

    @rule(digests=st.lists(st.integers(0, 4), max_size=3))
    def reuse_prefix(self, digests: list[int]) -> None:
        found = self.pool.find_prefix([b"%d" % digest for digest in digests])
        assert len(found) <= len(digests)
        idle = self.pool.idle(found)
        before = self.pool.available
        self.pool.take(found)
        # A digest drawn twice names the same block twice: it is idle only the first time.
        assert self.pool.available >= before - idle
        if found:
            self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.pool.release(holder)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.cached == 0

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        assert self.pool.free + self.pool.cached + self.pool.used == self.pool.total
        assert self.pool.available == self.pool.free + self.pool.cached

    @invariant()
    def used_are_exactly_those_held(self) -> None:
        assert self.pool.used == len({block for holder in self.holders for block in holder})

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.release(holder)
        assert self.pool.used == 0
        assert self.pool.available == self.pool.total


TestPool = PoolMachine.TestCase


def test_a_published_block_is_found_after_its_release_and_until_it_is_given_away() -> None:
    pool = BlockPool(2, SIZE)
    (block,) = pool.allocate(1)
    pool.publish(block, b"x")
    pool.release([block])
    assert (pool.free, pool.cached, pool.used) == (1, 1, 0)
    assert pool.find_prefix([b"x"]) == [block]
    pool.allocate(2)
    assert pool.find_prefix([b"x"]) == []


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(4, SIZE)
    older, newer = pool.allocate(2), pool.allocate(2)
    for block, digest in zip(older + newer, (b"a0", b"a1", b"b0", b"b1"), strict=True):
        pool.publish(block, digest)
    pool.release(older)
    pool.release(newer)
    pool.allocate(1)
    assert pool.find_prefix([b"a0", b"a1"]) == older[:1]
    pool.allocate(1)
    assert pool.find_prefix([b"a0", b"a1"]) == []
    assert pool.find_prefix([b"b0", b"b1"]) == newer


def test_a_shared_block_stays_until_its_last_user_leaves() -> None:
    pool = BlockPool(1, SIZE)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"x")
    pool.take(blocks)
    pool.release(blocks)
    assert pool.used == 1
    with pytest.raises(MemoryError):
        pool.allocate(1)
    pool.release(blocks)
    assert pool.available == 1


def test_of_two_equal_blocks_the_first_stays_the_known_one() -> None:
    pool = BlockPool(2, SIZE)
    first, second = pool.allocate(2)
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    pool.release([second])
    assert (pool.free, pool.cached) == (1, 0), "a block that nobody can find must not be kept"
    assert pool.find_prefix([b"x"]) == [first]


def test_without_reuse_nothing_is_kept() -> None:
    pool = BlockPool(2, SIZE, reuse=False)
    (block,) = pool.allocate(1)
    pool.publish(block, b"x")
    assert pool.find_prefix([b"x"]) == []
    pool.release([block])
    assert (pool.free, pool.cached) == (2, 0)


tokens = st.lists(st.integers(0, 3), max_size=4 * SIZE)
salts = st.sampled_from([b"one", b"two"])


@given(tokens, tokens, salts, salts)
def test_hashes_are_equal_as_far_as_salt_and_tokens_are(
    a: list[int], b: list[int], salt_a: bytes, salt_b: bytes
) -> None:
    hashes_a, hashes_b = block_hashes(a, salt_a, SIZE), block_hashes(b, salt_b, SIZE)
    assert len(hashes_a) == len(a) // SIZE
    for index in range(min(len(hashes_a), len(hashes_b))):
        end = (index + 1) * SIZE
        assert (hashes_a[index] == hashes_b[index]) == (salt_a == salt_b and a[:end] == b[:end])


@given(tokens, salts, st.integers(0, 4))
def test_hashing_continues_where_it_stopped(a: list[int], salt: bytes, known: int) -> None:
    whole = block_hashes(a, salt, SIZE)
    assert block_hashes(a, salt, SIZE, whole[:known]) == whole
