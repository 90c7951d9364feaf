"""Learned embeddings in the prompt: prompt tuning (Lester et al. 2021), P-tuning (Liu et al. 2021, "GPT
Understands, Too"), multitask prompt tuning (Wang et al. 2023), context-aware prompt tuning (Blau et al. 2024).

PEFT stores what P-tuning's LSTM or MLP encoder gave, and CPT's tokens with their bounded changes added, so nothing
of these is left to run."""

from dataclasses import replace

from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import VirtualTokens

_TENSOR, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


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


def lower_multitask(source: Source) -> Lowered:
    """The shared `prompt_embeddings` [n, hidden], times the task's own matrix of low rank (Wang et al. 2023,
    section 3.1): `prefix_task_cols` [tasks, n, ranks] by `prefix_task_rows` [tasks, ranks, hidden]."""
    shared = source.take(_TENSOR, (None, source.base.hidden))
    columns = source.take(_COLUMNS, (None, len(shared), None))
    tasks, _, ranks = columns.shape
    rows = source.take(_ROWS, (tasks, ranks, source.base.hidden))
    source.refuse_others({_TENSOR, _COLUMNS, _ROWS})
    task = source.task(tasks)
    return lower(replace(source, tensors={_TENSOR: shared * (columns[task] @ rows[task])}))
