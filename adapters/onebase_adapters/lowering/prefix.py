"""Prefix tuning (Li and Liang 2021) and P-tuning v2 (Liu et al. 2022), which adds a head: learned keys and values
in front of every layer. PEFT stores them with the reparametrisation's MLP already applied."""

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import KVPrefix

_TENSOR = "prompt_embeddings"


def lower(source: Source) -> Lowered:
    """`prompt_embeddings` [n, layers * 2 * kv_heads * dim]: of each layer all keys, then all values."""
    source.refuse_others({_TENSOR})
    base = source.base
    if not base.kv_heads:
        raise AdapterMismatchError(
            f"The layers of {base.name} do not all have the same heads: it takes no prefix.", field="peft_type"
        )
    stored = source.take(_TENSOR, (None, base.layers * 2 * base.kv_heads * base.head_dim))
    count = len(stored)
    if count >= base.context:
        raise AdapterFormatError(
            f"{count} prefix tokens leave no room in a context of {base.context}.", field="num_virtual_tokens"
        )
    keys, values = stored.view(count, base.layers, 2, base.kv_heads, base.head_dim).permute(2, 1, 0, 3, 4)
    return Lowered((KVPrefix(keys.contiguous(), values.contiguous()),))
