"""Bottleneck adapters: Houlsby et al. 2019 (behind attention and FFN), Pfeiffer et al. 2021 (behind the FFN),
parallel (He et al. 2022, beside the FFN). PEFT has no format for them; ours has its two files, see `lower`."""

from typing import Any

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import ACTIVATIONS, Bottleneck

_PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def lower(source: Source) -> Lowered:
    """`adapter_config.json`: `placement`, `activation`, `scale`. Tensors, for each sublayer (the module path of an
    attention or MLP block): `SUBLAYER.down.weight` [r, hidden], `.down.bias` [r], `.up.weight` [hidden, r],
    `.up.bias` [hidden]."""
    config, hidden = source.config, source.base.hidden
    placement: Any = config.get("placement")
    activation: Any = config.get("activation")
    if placement not in _PLACEMENTS:
        raise AdapterFormatError(f"placement {placement!r} is none of {', '.join(_PLACEMENTS)}.", field="placement")
    if activation not in ACTIVATIONS:
        raise AdapterFormatError(
            f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}.", field="activation"
        )
    if placement == "parallel" and source.base.encoder:
        raise AdapterMismatchError("Parallel bottlenecks are for decoders only.", field="placement")
    known: set[str] = set()
    found = []
    for site in sorted({name.rsplit(".", 2)[0] for name in source.tensors}):
        if site not in source.base.sublayers:
            raise AdapterMismatchError(f"Base {source.base.name} has no sublayer {site!r}.", field="path")
        down = source.take(f"{site}.down.weight", (None, hidden))
        rank = len(down)
        found.append(
            Bottleneck(
                site=site,
                down=down,
                down_bias=source.take(f"{site}.down.bias", (rank,)),
                up=source.take(f"{site}.up.weight", (hidden, rank)),
                up_bias=source.take(f"{site}.up.bias", (hidden,)),
                activation=activation,
                scale=float(config.get("scale", 1.0)),
                parallel=placement == "parallel",
            )
        )
        known |= {f"{site}.{half}.{leaf}" for half in ("down", "up") for leaf in ("weight", "bias")}
    source.refuse_others(known)
    return Lowered(tuple(found))
