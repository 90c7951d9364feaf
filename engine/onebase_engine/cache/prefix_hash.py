"""When two prefixes are the same: by adapter, tenant and token ids, block by block."""

import hashlib
from array import array
from collections.abc import Sequence

BlockHash = bytes


def block_hashes(
    tokens: Sequence[int], salt: bytes, block_size: int, known: Sequence[BlockHash] = ()
) -> list[BlockHash]:
    """Hashes of the full blocks of `tokens`, each chained to the one before (the first to `salt`, at most 64
    bytes); continues after `known`."""
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else salt
        content = array("q", tokens[start : start + block_size]).tobytes()
        hashes.append(hashlib.blake2b(content, digest_size=16, key=parent).digest())
    return hashes
