"""Learned embeddings in the prompt: prompt tuning (Lester et al. 2021), P-tuning (Liu et al. 2021, "GPT
Understands, Too"). PEFT stores what P-tuning's LSTM or MLP encoder gave, so nothing of it is left to run."""

from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.methods.source import Lowered, Source
from onebase_adapters.primitives import VirtualTokens

_TENSOR = "prompt_embeddings"


def lower(source: Source) -> Lowered:
    """`prompt_embeddings` [n, hidden]; their places from our trainer's notes, else all in front."""
    source.refuse_others({_TENSOR})
    embeddings = source.take(_TENSOR, (None, source.base.hidden))
    stated = source.config.get("num_virtual_tokens")
    if source.base.encoder_decoder and source.config.get("num_transformer_submodules") == 2:
        embeddings = embeddings[: len(embeddings) // 2]  # PEFT keeps as many for the decoder, and never reads them
    count = len(embeddings)
    if stated is not None and stated != count:
        raise AdapterFormatError(
            f"adapter_config.json says {stated} virtual tokens, the tensor has {count}.", field="num_virtual_tokens"
        )
    if count >= source.base.context:
        raise AdapterFormatError(
            f"{count} virtual tokens leave no room in a context of {source.base.context}.",
            field="num_virtual_tokens",
        )
    places = source.sidecar.get("places", [0] * count)
    if (
        not isinstance(places, list)
        or len(places) != count
        or not all(type(place) is int and place >= -1 for place in places)
    ):
        raise AdapterFormatError(
            f"onebase.json: 'places' must be {count} integers, each -1 or above.", field="places"
        )
    return Lowered((VirtualTokens(embeddings, tuple(places)),))
