"""Retrained tokens: rows of the embedding, and of the head that shares its matrix, that have been replaced (PEFT's
trainable tokens, by themselves or beside any other method)."""

from typing import Any

import torch

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import LowRank

_END = ".trainable_tokens_delta"
_WRAPPER = ".token_adapter"
"""The name between module and tensor where tokens are retrained beside another method."""


def lower(source: Source) -> Lowered:
    """Nothing but retrained tokens, which `retrained_tokens` has taken."""
    source.refuse_others(set())
    return Lowered(())


def retrained_tokens(source: Source) -> tuple[list[LowRank], set[str]]:
    """For each module `NAME.trainable_tokens_delta` [tokens, hidden], the new rows themselves: y changes by
    (new - old) of that row, a LowRank of rank `tokens`. Also the names of the tensors read."""
    taken = {name for name in source.tensors if name.endswith(_END) and ".base_layer." not in name}
    found = {name.removesuffix(_END).removesuffix(_WRAPPER): name for name in sorted(taken)}
    rows = [_replaced_rows(source, module, _token_ids(source, module), name) for module, name in found.items()]
    embedding, head = source.base.embedding, source.base.tied_head
    if head and embedding in found and head not in found:
        rows.append(_replaced_rows(source, head, _token_ids(source, embedding), found[embedding]))
    return rows, taken


def _replaced_rows(source: Source, module: str, tokens: list[int], name: str) -> LowRank:
    old = source.weights.weight(module if module == source.base.embedding else source.site(module).name)
    change = source.take(name, (len(tokens), old.shape[1])) - old[tokens]
    chosen = torch.zeros(len(tokens), len(old))
    chosen[torch.arange(len(tokens)), tokens] = 1.0
    if module == source.base.embedding:
        return LowRank(module, chosen, change.t(), 1.0)
    return LowRank(module, change, chosen.t(), 1.0)


def _token_ids(source: Source, module: str) -> list[int]:
    field = "token_indices" if source.config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    stated: Any = source.config.get(field)
    if isinstance(stated, dict):
        stated = next((ids for part, ids in stated.items() if f".{module}".endswith(f".{part}")), None)
    if not isinstance(stated, list) or not all(type(token) is int for token in stated):
        raise AdapterFormatError(f"adapter_config.json: {field} must list the tokens of {module!r}.", field=field)
    if len(set(stated)) != len(stated):
        raise AdapterFormatError(f"adapter_config.json: {field} names a token twice.", field=field)
    if wrong := [token for token in stated if not 0 <= token < source.base.vocab]:
        raise AdapterMismatchError(
            f"The adapter retrains token {wrong[0]}, and the base has {source.base.vocab}: new tokens are not "
            "served. Train without them.",
            field=field,
        )
    return stated
