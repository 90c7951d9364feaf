"""A base with an adapter merged into its weights, written as a transformers model in bfloat16.

The weights are those that the adapter is served with: a 4-bit base is expanded, so that the result says what the
server says, not what the unrounded base would.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import AdapterError
from onebase_adapters.merge import changed_sites, check_mergeable, merge_site
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.load_base import LoadedBase, quiet_loading
from onebase_engine.base.mixture import joined
from onebase_engine.base.model_weights import ModelWeights


def write_merged(base: LoadedBase, adapter: LoweredAdapter, folder: Path) -> None:
    """Write the model, its tokenizer and its chat template into `folder`. Raises AdapterError for what weights
    cannot carry, or StorageError."""
    check_mergeable(adapter)
    changed = changed_sites(adapter)
    untied = bool(base.shape.tied_head) and bool(changed & {base.shape.embedding, base.shape.tied_head})
    empty = _empty(base, untied=untied)
    state = _plain_state(base, empty)
    weights = ModelWeights(base.model)
    if untied:
        state[f"{base.shape.tied_head}.weight"] = weights.weight(base.shape.embedding)
    for site in sorted(changed):
        merged = merge_site(adapter, site, weights, embedding=site == base.shape.embedding)
        if merged.bias is not None and weights.bias(site) is None and bool(merged.bias.any()):
            raise AdapterError(
                f"The adapter gives {site} a bias, for which {type(base.model).__name__} has no place: it can only "
                "be served.",
                field="path",
            )
        state[f"{site}.weight"] = _stored(empty, site, merged.weight)
        if weights.bias(site) is not None and merged.bias is not None:
            state[f"{site}.bias"] = merged.bias
    if adapter.chat_template is not None:
        base.tokenizer.chat_template = adapter.chat_template
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in joined(state).items()}
    with quiet_loading(), disk_errors(str(folder)):
        empty.save_pretrained(folder, state_dict=rounded)
        base.tokenizer.save_pretrained(folder)


def expanded_model(base: LoadedBase) -> Any:
    """The base as a model of transformers alone, in bfloat16 on the CPU, of the weights that it is served with."""
    empty = _empty(base, untied=False)
    state = {name: value.to(torch.bfloat16) for name, value in _plain_state(base, empty).items()}
    empty.load_state_dict(state, strict=False, assign=True)
    empty.tie_weights()
    return empty.eval()


def _empty(base: LoadedBase, *, untied: bool) -> Any:
    """The model without weights, and without its quantisation."""
    from accelerate import init_empty_weights

    model: Any = base.model
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = config.tie_word_embeddings and not untied
    with init_empty_weights(include_buffers=False):
        empty = type(model)._from_config(config, dtype=torch.bfloat16)
    empty.generation_config = getattr(model, "generation_config", None)
    return empty


def _plain_state(base: LoadedBase, empty: Any) -> dict[str, torch.Tensor]:
    """All parameters as plain numbers, a tied head once."""
    weights, state = ModelWeights(base.model), {}
    for name, parameter in base.model.named_parameters():
        module, _, last = name.rpartition(".")
        coded = last == "weight" and not parameter.is_floating_point()
        state[name] = _stored(empty, module, weights.weight(module)) if coded else parameter.detach().cpu()
    return state


def _stored(empty: Any, site: str, weight: torch.Tensor) -> torch.Tensor:
    """A linear weight [out, in] in the order that the model keeps it."""
    # A mixture's experts are no modules there.
    return weight.T if isinstance(dict(empty.named_modules()).get(site), Conv1D) else weight
