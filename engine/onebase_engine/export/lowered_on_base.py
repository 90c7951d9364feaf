"""An adapter's folder as it is served, without a server: the base, and what the adapter is lowered to on it."""

from pathlib import Path

from onebase_adapters.formats.checks import check_folder
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase, load_base
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.base.package_files import Progress


def load_lowered(path: Path, spec: BaseSpec, progress: Progress) -> tuple[LoadedBase, LoweredAdapter]:
    """Raises what a server would answer when it refuses the adapter: AdapterError and its branches; or
    BaseModelError."""
    base = load_base(spec, progress=progress)
    check_folder(path, base.tokenizer.get_vocab())
    return base, load_adapter(path, path.name, base.shape, ModelWeights(base.model))
