"""Combinations of primitives that no base serves, refused with the reason."""

from collections import Counter
from collections.abc import Sequence

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.source import Source
from onebase_adapters.primitives.instruction_set import Head, LowRank, Primitive, Rescale, Shift


def _refuse_what_encoder_decoders_lack(kind: str, source: Source, saved: Sequence[Primitive]) -> None:
    base = source.base
    embedding = any(name.startswith(f"{base.embedding}.") for name in source.tensors)
    head = any(isinstance(part, Head) for part in saved)
    if base.encoder_decoder and (kind in ("CARTRIDGE", "BOTTLENECK") or embedding or head):
        raise AdapterMismatchError(
            f"{base.name} is an encoder-decoder: it takes updates of its linear modules, prompt tuning and prefix "
            "tuning, but no cartridge, bottleneck, head or update of its embedding.",
            field="peft_type",
        )


def _refuse_conflicts(primitives: Sequence[Primitive]) -> None:
    """A site takes one change of each kind. No method both rescales a site's input and updates it; sites that
    share an input are not made for that."""
    changes = [
        (part.site, type(part).__name__, part.side if isinstance(part, Rescale) else "")
        for part in primitives
        if isinstance(part, LowRank | Rescale | Shift)
    ]
    if twice := [site for (site, *_), count in Counter(changes).items() if count > 1]:
        raise AdapterFormatError(f"Site {twice[0]!r} is changed twice in the same way: not served.", field="path")
    rescaled = {part.site for part in primitives if isinstance(part, Rescale) and part.side == "input"}
    updated = {part.site for part in primitives if isinstance(part, LowRank)}
    if both := sorted(rescaled & updated):
        raise AdapterFormatError(
            f"Site {both[0]!r} has its input rescaled and a low-rank update: not served.", field="path"
        )
