"""The methods by their PEFT type: one file each, one line here. Lowering turns stored tensors into primitives."""

from collections.abc import Mapping
from pathlib import Path

from onebase_adapters.base_shape import BaseShape
from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.formats.read_adapter import check_base, read_adapter
from onebase_adapters.lowering import beft, bottleneck, ia3, lora, poly, prefix, prompt, template
from onebase_adapters.lowering import retrained_tokens as tokens
from onebase_adapters.lowering import weight_methods as general
from onebase_adapters.lowering.check_conflicts import _refuse_conflicts, _refuse_what_encoder_decoders_lack
from onebase_adapters.lowering.saved_modules import split_saved
from onebase_adapters.lowering.source import BaseWeights, Lower, Source, canonical_names
from onebase_adapters.lowering.unserved import UNSERVED
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter

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
    form = check_base(files, base)
    kind = str(files.config.get("peft_type", "")).upper()
    if kind in UNSERVED:
        raise AdapterFormatError(f"{kind} is not served. It {UNSERVED[kind]}", field="peft_type")
    if kind not in METHODS:
        raise AdapterFormatError(
            f"peft_type {files.config.get('peft_type')!r} is not served. Known: {', '.join(sorted(METHODS))}.",
            field="peft_type",
        )
    source = Source(files.config, canonical_names(files.tensors, base), files.sidecar, base, weights)
    saved, rest = split_saved(source)
    _refuse_what_encoder_decoders_lack(kind, source, saved)
    lowered = METHODS[kind](rest)
    primitives = saved + lowered.primitives
    if not primitives and not files.tensors:
        raise AdapterFormatError("The adapter changes nothing: it has no weights for any site.", field="path")
    _refuse_conflicts(primitives)
    return LoweredAdapter(digest, kind.lower(), primitives, form + lowered.notes, files.chat_template)
