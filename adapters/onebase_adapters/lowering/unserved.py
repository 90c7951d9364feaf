"""PEFT types that are not served: what each of them needs that many adapters over one 4-bit base have not."""

from collections.abc import Mapping

_MERGE = (
    "Merge it into its base with merge_and_unload(), then serve that as a base, or what `onebase adapters extract` "
    "makes of it."
)
_TRAIN = "Train one of the methods that `onebase methods` lists."

UNSERVED: Mapping[str, str] = {
    "ADAMSS": f"clusters the singular vectors of the weights that it was trained on; 4-bit ones differ. {_MERGE}",
    "ADAPTION_PROMPT": f"adds, through a gate, a second attention over its prompt to the first. {_TRAIN}",
    "BOFT": f"rotates all outputs of a site, which no low rank holds. {_MERGE}",
    "FROD": f"takes its bases from the weights that it was trained on; 4-bit ones differ. {_MERGE}",
    "LILY": f"mixes its experts anew for each token. {_TRAIN}",
    "LN_TUNING": f"replaces the norms, whose outputs heads and embeddings read, too. {_MERGE}",
    "PSOFT": f"rotates the singular vectors of the weights that it was trained on; 4-bit ones differ. {_MERGE}",
    "SHADOW": f"runs a second model beside the base. {_TRAIN}",
    "SHIRA": f"changes single weights all over a matrix, which no low rank holds. {_MERGE}",
    "SUPERTUNING": f"changes single weights all over a matrix, which no low rank holds. {_MERGE}",
    "XLORA": f"weighs its LoRA adapters anew for each token, after a first pass over the prompt. {_TRAIN}",
}
"""By type: the reason, after "It", and the way out."""
