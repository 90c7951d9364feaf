"""An adapter for PEFT, and for all that reads PEFT's folders: written aside, loaded by PEFT on the base's own
weights, compared with what is served, only then put in place."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.errors import AdapterError
from onebase_adapters.formats.chat_template import CHAT_TEMPLATE_FILE
from onebase_adapters.formats.peft_folder import CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE, read_object
from onebase_adapters.peft_form import peft_form
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.base.package_files import Progress
from onebase_engine.export.agreement import check_agreement, served_tokens
from onebase_engine.export.lowered_on_base import load_lowered
from onebase_engine.export.merged_model import expanded_model
from onebase_engine.export.model_card import CARD_FILE, Card, check_free, render_card


def export_peft(
    path: Path,
    output: Path,
    spec: BaseSpec,
    prompts: Sequence[str | Sequence[int]],
    *,
    least: float,
    progress: Progress,
) -> float:
    """Write the adapter in `path` to the folder `output` as PEFT has it; gives the share of the served adapter's
    greedy tokens after `prompts` that PEFT finds likeliest, too.

    Raises ConfigError (output exists), AdapterError and its branches (PEFT has no form for it, or fewer than
    `least` agree), BaseModelError or StorageError. Then nothing is written.
    """
    check_free(output)
    base, adapter = load_lowered(path, spec, progress)
    if base.shape.encoder_decoder:
        raise AdapterError(f"{spec.model} is an encoder-decoder: its adapters are not written here.", field="model")
    for note in adapter.notes:
        progress(f"note: {note}")
    with staged_directory(output) as folder:
        write_peft(base, adapter, folder)
        progress("comparing with the served adapter")
        agreed = peft_agreement(base, folder, served_tokens(spec, path, prompts))
        check_agreement(agreed, least)
        _write_notes(path, output.name, base, adapter, agreed, folder)
    return agreed


def write_peft(base: LoadedBase, adapter: LoweredAdapter, folder: Path) -> None:
    """Write PEFT's two files, and the adapter's own chat template. Raises AdapterError for what PEFT has no form
    for."""
    form = peft_form(adapter, base.shape, ModelWeights(base.model))
    (folder / CONFIG_FILE).write_text(json.dumps(form.config, indent=2) + "\n", encoding="utf-8")
    save_file(form.tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    if adapter.chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(adapter.chat_template, encoding="utf-8")


def _write_notes(
    path: Path, name: str, base: LoadedBase, adapter: LoweredAdapter, agreed: float, folder: Path
) -> None:
    """What is known of the adapter, but for what only its own form needs, and the card."""
    notes = read_object(path / SIDECAR_FILE)
    kept: dict[str, Any] = {key: notes[key] for key in ("base", "method", "data", "metrics") if key in notes}
    if kept:
        (folder / SIDECAR_FILE).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    hub_id = base.shape.hub_id
    about = (
        f"An adapter of {notes.get('method', adapter.method)} for {hub_id}, as PEFT loads it. Of the adapter's "
        f"greedy tokens as OneBase serves it ({base.held}), {agreed:.1%} are PEFT's best, too."
    )
    commands = [f"onebase serve --model {base.shape.name} --adapter-root .   # and register the folder {name}"]
    card = Card(name, hub_id, "peft", "adapter", about, commands, kept)
    (folder / CARD_FILE).write_text(render_card(card), encoding="utf-8")


@torch.inference_mode()
def peft_agreement(base: LoadedBase, folder: Path, written: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """The share of the written tokens that PEFT finds likeliest, too, with the adapter in `folder`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, of biases where the base has none
        model = PeftModel.from_pretrained(expanded_model(base), folder).eval()
    same = total = 0
    for prompt, tokens in written:
        if tokens:
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
            found = logits[-len(tokens) - 1 : -1].argmax(-1)
            same += int((found == torch.tensor(tokens)).sum())
            total += len(tokens)
    return same / total if total else 1.0
