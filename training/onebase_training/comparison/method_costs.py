"""The cost of each method on a base, measured: it is put on a base of one layer and on one of two, and written.

Everything is linear in the number of layers, so the rest is arithmetic; the base's real weights are not needed.
Parameters are moved at random first: methods begin with no change, or with less of it than they come to.
"""

import copy
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from onebase_adapters.errors import AdapterError
from onebase_adapters.lowering.lower import load_adapter
from onebase_contract.settings import TrainConfig
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.describe import describe_base
from onebase_engine.base.load_base import LoadedBase, quiet_loading
from onebase_engine.base.mixture import is_mixture, split_mixture
from onebase_engine.base.model_weights import ModelWeights
from onebase_training.methods.attach import Method

_STEPS = 100
"""Length of the run that some methods' schedules are made for."""
_MOVE = 0.02


@dataclass(frozen=True)
class Overview:
    """A method on a base, with its default settings."""

    trained: int
    """Parameters that take gradients."""
    file_bytes: int
    """The size of the adapter's weights."""
    products: int
    """Multiplications that a served token costs beside the base's."""
    context: int
    """Tokens that each request gives up."""
    served_as: str


def overview(name: str, method: Method, model: str) -> Overview:
    """Raises BaseModelError and its branches, and ConfigError where the method does not fit the base."""
    folder = fetch_base(model)
    layers = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    one, two = (_of(name, method, folder, depth) for depth in (1, 2))

    def all_layers(field: str) -> int:
        first, second = getattr(one, field), getattr(two, field)
        return int(first + (layers - 1) * (second - first))

    return replace(
        one,
        trained=all_layers("trained"),
        file_bytes=all_layers("file_bytes"),
        products=all_layers("products"),
    )


def _of(name: str, method: Method, folder: Path, depth: int) -> Overview:
    if method.attach is None:
        return Overview(0, 0, 0, 0, "Template")
    base, weights = _shallow(folder, depth), ModelWeights(_bare(folder, depth))
    config = TrainConfig(data=(), output=Path("unused"), method=name, device="cpu")
    attached = method.attach(base, config, _STEPS)
    extra = list(attached.extra.parameters()) if attached.extra is not None else []
    moving = [p for p in [*attached.model.parameters(), *extra] if p.requires_grad]
    trained = sum(p.numel() for p in moving)
    with torch.no_grad():
        for parameter in moving:
            parameter += _MOVE * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as scratch:
        attached.save(Path(scratch))
        size = sum(path.stat().st_size for path in Path(scratch).glob("*.safetensors"))
        context = len(attached.places) + attached.prefix_length
        try:
            lowered = load_adapter(Path(scratch), name, base.shape, weights)
        except AdapterError:
            return Overview(trained, size, 0, context, "a base" if name == "full" else "not: merged only")
    kinds = ", ".join(dict.fromkeys(type(primitive).__name__ for primitive in lowered.primitives))
    products = 0 if context else lowered.parameters
    return Overview(trained, size, products, context, kinds)


def _shallow(folder: Path, depth: int) -> LoadedBase:
    """A base of the folder's sizes with few layers and random weights."""
    model = copy.deepcopy(_bare(folder, depth))
    return LoadedBase(model, _tokenizer(folder), describe_base(model, str(folder), "shallow"), torch.device("cpu"))


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@lru_cache(maxsize=2)
def _bare(folder: Path, depth: int) -> Any:
    config: Any = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    with quiet_loading():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if is_mixture(config):
        split_mixture(model, lambda each: each)
    return model.requires_grad_(False)
