"""(IA)^3 (Liu et al. 2022, section 3.3): learned vectors that rescale keys, values and the FFN's activations."""

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import Rescale

_END = ".ia3_l"


def lower(source: Source) -> Lowered:
    """One Rescale for each vector: [1, in] is for a site's input (feedforward modules), [out, 1] its output."""
    rescales = []
    for name, tensor in sorted(source.tensors.items()):
        if not name.endswith(_END) or tensor.dim() != 2 or 1 not in tensor.shape:
            raise AdapterFormatError(f"Tensor {name!r} is not a vector of (IA)^3.", field="path")
        site = source.site(name.removesuffix(_END))
        side, size = ("input", site.in_features) if tensor.shape[0] == 1 else ("output", site.out_features)
        if tensor.numel() != size:
            raise AdapterMismatchError(
                f"Tensor {name!r} has {tensor.numel()} numbers; the {side} of this site has {size}.", field="path"
            )
        rescales.append(Rescale(site.name, tensor.float().flatten(), "input" if side == "input" else "output"))
    return Lowered(tuple(rescales))
