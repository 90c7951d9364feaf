"""The methods by their PEFT type: one file each, one line here. Lowering turns stored tensors into primitives."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from onebase_adapters.base.shape import BaseShape
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.files import check_base, read_adapter
from onebase_adapters.methods import beft, bottleneck, general, ia3, lora, poly, prefix, prompt, template, tokens
from onebase_adapters.methods.saved import split_saved
from onebase_adapters.methods.source import BaseWeights, Lower, Source, canonical_names
from onebase_adapters.methods.unserved import UNSERVED
from onebase_adapters.primitives import Head, LoweredAdapter, LowRank, Primitive, Rescale, Shift

_WEIGHT_METHODS = (
    "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "MISS", "OFT", "OSF",
    "PEANUT", "PVERA", "RANDLORA", "ROAD", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
METHODS: Mapping[str, Lower] = {
    "LORA": lora.lower,
    "ADALORA": lora.lower,
    "IA3": ia3.lower,
    "PROMPT_TUNING": prompt.lower,
    "P_TUNING": prompt.lower,
    "CPT": prompt.lower,
    "MULTITASK_PROMPT_TUNING": prompt.lower_multitask,
    "PREFIX_TUNING": prefix.lower,
    "CARTRIDGE": prefix.lower,
    "TRAINABLE_TOKENS": tokens.lower,
    "POLY": poly.lower,
    "BEFT": beft.lower,
    "BOTTLENECK": bottleneck.lower,
    "TEMPLATE": template.lower,
    **dict.fromkeys(_WEIGHT_METHODS, general.lower),
}


def load_adapter(folder: Path, digest: str, base: BaseShape, weights: BaseWeights) -> LoweredAdapter:
    """Read, check and lower the adapter in `folder` for `base`. Raises AdapterError and its branches."""
    files = read_adapter(folder)
    check_base(files, base)
    kind = str(files.config.get("peft_type", "")).upper()
    if kind in UNSERVED:
        raise AdapterFormatError(f"{kind} is not served. It {UNSERVED[kind]}", field="peft_type")
    if kind not in METHODS:
        raise AdapterFormatError(
            f"peft_type {files.config.get('peft_type')!r} is not served. Known: {', '.join(sorted(METHODS))}.",
            field="peft_type",
        )
    source = Source(files.config, canonical_names(files.tensors), files.sidecar, base, weights)
    saved, rest = split_saved(source)
    _refuse_what_encoder_decoders_lack(kind, source, saved)
    lowered = METHODS[kind](rest)
    primitives = saved + lowered.primitives
    if not primitives:
        raise AdapterFormatError("The adapter changes nothing: it has no weights for any site.", field="path")
    _refuse_conflicts(primitives)
    return LoweredAdapter(digest, kind.lower(), primitives, lowered.notes)


def _refuse_what_encoder_decoders_lack(kind: str, source: Source, saved: Sequence[Primitive]) -> None:
    base = source.base
    embedding = any(name.startswith(f"{base.embedding}.") for name in source.tensors)
    head = any(isinstance(part, Head) for part in saved)
    if base.encoder_decoder and (kind in ("PREFIX_TUNING", "CARTRIDGE", "BOTTLENECK") or embedding or head):
        raise AdapterMismatchError(
            f"{base.name} is an encoder-decoder: it takes updates of its linear modules and prompt tuning, but no "
            "prefix, bottleneck, head or update of its embedding.",
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
