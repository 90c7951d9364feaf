"""Merging to a folder or a file: written aside, read back, compared with what is served, only then put in place."""

from collections.abc import Sequence
from pathlib import Path

from onebase_adapters.atomic_files import scratch_beside
from onebase_adapters.errors import ConfigError
from onebase_adapters.formats.peft_folder import SIDECAR_FILE, read_object
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.base.package_files import Progress
from onebase_engine.export.agreement import agreement, check_agreement, served_tokens
from onebase_engine.export.gguf_model import read_back, write_gguf_model
from onebase_engine.export.lowered_on_base import load_lowered
from onebase_engine.export.merged_model import write_merged
from onebase_engine.export.model_card import CARD_FILE, Card, Library, card_of, check_free, render_card
from onebase_engine.export.model_form import ModelForm


def merge_checked(
    path: Path,
    output: Path,
    spec: BaseSpec,
    prompts: Sequence[str | Sequence[int]],
    *,
    least: float,
    progress: Progress,
    form: ModelForm = "transformers",
) -> float:
    """Merge the adapter in `path` into its base and write the model to `output`; gives the share of the served
    adapter's greedy tokens after `prompts` that the written model finds likeliest, too.

    Raises ConfigError (output exists), AdapterError and its branches (it cannot be merged, or fewer than `least`
    agree), BaseModelError or StorageError. Then nothing is written.
    """
    check_free(output)
    if form != "transformers" and output.suffix != ".gguf":
        raise ConfigError(f"{output} is to be a GGUF file: let its name end in .gguf.", field="output")
    base, adapter = load_lowered(path, spec, progress)
    progress(f"merging into the base as it is served: {base.held}")
    with scratch_beside(output) as scratch:
        made = compared = scratch / "model"
        made.mkdir()
        write_merged(base, adapter, made)
        if form != "transformers":
            made, compared = scratch / output.name, scratch / "read"
            write_gguf_model(scratch / "model", made, form)
            compared.mkdir()
            read_back(scratch / "model", made, compared, progress)
        progress("comparing with the served adapter")
        agreed = agreement(compared, served_tokens(spec, path, prompts), spec.device)
        check_agreement(agreed, least)
        card = scratch / CARD_FILE if made.is_file() else made / CARD_FILE
        card.write_text(_card(path, output, base, adapter, agreed), encoding="utf-8")
        made.replace(output)
        if card.parent == scratch:
            card.replace(card_of(output))
    return agreed


def _card(path: Path, output: Path, base: LoadedBase, adapter: LoweredAdapter, agreed: float) -> str:
    notes, as_file = read_object(path / SIDECAR_FILE), output.suffix == ".gguf"
    about = (
        f"{base.shape.hub_id} as OneBase holds it ({base.held}), with an adapter of "
        f"{notes.get('method', adapter.method)} merged into its weights. Of the served adapter's greedy tokens, "
        f"{agreed:.1%} are this model's best, too."
    )
    commands = [f"onebase serve --model {output.name}"]
    if as_file:
        commands.append(f"llama-server -m {output.name}")
    library: Library = "gguf" if as_file else "transformers"
    return render_card(Card(output.stem, base.shape.hub_id, library, "merge", about, commands, notes))
