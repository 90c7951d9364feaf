"""`onebase adapters`: what an adapter is and whether it can be served, and the ways into one and out of it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec, Quantization
from onebase_engine.export.model_form import ModelForm

if TYPE_CHECKING:  # it imports torch
    from onebase_adapters.extract import Extraction

app = typer.Typer(
    help="Look at adapters, make them from fine-tuned models, and hand them on.", no_args_is_help=True
)

_Push = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME", help="Send it to this repository of a hub, once it is written.")
]
_Private = Annotated[bool, typer.Option("--private", help="Let only its owner read that repository.")]
_COMPARED = 32
"""Examples that a merged model is compared by."""


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="An adapter's folder: ours, or any that PEFT wrote.")],
    *,
    model: Annotated[str, typer.Option(help="The base it would be served on.")] = DEFAULT_BASE,
) -> None:
    """Tell an adapter's method, size and parts, and whether and how it is served."""
    from onebase_adapters.formats.peft_folder import WEIGHTS_FILE
    from onebase_adapters.formats.read_adapter import read_adapter
    from onebase_adapters.primitives.instruction_set import Head, Template
    from onebase_engine.export.lowered_on_base import load_lowered

    files = read_adapter(path)
    weights = path / WEIGHTS_FILE
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    trained_on = files.sidecar.get("base", {}).get("model") or files.config.get("base_model_name_or_path")
    table.add_row("method", str(files.config.get("peft_type")))
    table.add_row("trained on", str(trained_on))
    table.add_row("tensors", f"{len(files.tensors)}, {sum(t.numel() for t in files.tensors.values()):,} numbers")
    table.add_row("file", f"{weights.stat().st_size / 2**20:.2f} MiB, sha256 {digest}")
    console.print(table)
    _, adapter = load_lowered(path, BaseSpec(model, device="cpu"), console.print)
    table = Table(show_header=False, box=None, title=f"served on {model} as", title_justify="left")
    for line in adapter.summary():
        table.add_row("", line)
    if adapter.rank:
        table.add_row("rank", str(adapter.rank))
    table.add_row("parameters", f"{adapter.parameters:,}")
    table.add_row("changes", f"{adapter.sites} modules")
    table.add_row("context", f"{adapter.layout.tokens} virtual tokens a request")
    if (head := adapter.one(Head)) is not None:
        table.add_row("labels", ", ".join(head.labels))
    if (template := adapter.one(Template)) is not None:
        for part in ("before", "after", "messages", "stop"):
            if text := getattr(template, part):
                table.add_row(part, json.dumps(text, ensure_ascii=False))
    for note in adapter.notes:
        table.add_row("note", note)
    console.print(table)


@app.command("extract")
def extract_command(
    finetuned: Annotated[Path, typer.Argument(help="Folder of the fully fine-tuned model.")],
    *,
    output: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    base: Annotated[str, typer.Option(help="What it was fine-tuned from.")] = DEFAULT_BASE,
    rank: Annotated[int, typer.Option(min=1, help="Largest rank of a site's update.")] = 64,
) -> None:
    """Make a low-rank adapter of (fine-tuned minus base), and tell its error."""
    result = extract_folders(finetuned, base, output, rank=rank)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{result.sites} sites, rank {result.rank} at most: relative error {result.error:.2%}")
    if result.untouched:
        console.print(
            f"trained, but not in the adapter: {', '.join(result.untouched[:5])} ({len(result.untouched)})"
        )
    console.print(f"Wrote {output}")


@app.command("merge")
def merge_command(
    path: Annotated[Path, typer.Argument(help="An adapter's folder: ours, or any that PEFT wrote.")],
    *,
    output: Annotated[Path, typer.Option(help="Folder, or .gguf file, of the merged model.")],
    to: Annotated[
        ModelForm, typer.Option(help="A transformers folder, or one GGUF file: in bfloat16, float16 or 8 bits.")
    ] = "transformers",
    model: Annotated[str, typer.Option(help="The base that it is served on.")] = DEFAULT_BASE,
    quantization: Annotated[Quantization, typer.Option(help="How the base is held where it is served.")] = "nf4",
    data: Annotated[
        Path | None, typer.Option(help="Held-out examples to compare by. Default: some usual texts.")
    ] = None,
    least_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Write nothing if fewer of the greedy tokens agree.")
    ] = 0.9,
    push: _Push = None,
    private: _Private = False,
) -> None:
    """Merge an adapter into its base: a transformers model in bfloat16, or a GGUF file. What is written is compared
    with the served adapter before it is kept."""
    from onebase_engine.export.merge_checked import merge_checked

    console = Console(highlight=False, soft_wrap=True)
    agreed = merge_checked(
        path,
        output,
        BaseSpec(model, quantization, device="cpu"),
        _prompts(data, model),
        least=least_agreement,
        progress=console.print,
        form=to,
    )
    console.print(f"of the served adapter's greedy tokens, {agreed:.1%} are the written model's best, too")
    console.print(f"Wrote {output}")
    _send(output, push, private=private, console=console)


@app.command("export")
def export_command(
    path: Annotated[Path, typer.Argument(help="An adapter's folder: ours, or any that PEFT wrote.")],
    *,
    output: Annotated[Path, typer.Option(help="The .gguf file, or PEFT's folder.")],
    to: Annotated[
        Literal["gguf", "peft"],
        typer.Option(help="llama.cpp's adapter, or PEFT's own folder, as LoRA where it can be one."),
    ] = "gguf",
    model: Annotated[str, typer.Option(help="The base that it is served on.")] = DEFAULT_BASE,
    data: Annotated[
        Path | None, typer.Option(help="Of peft: held-out examples to compare by. Default: some usual texts.")
    ] = None,
    least_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Of peft: write nothing if fewer of the greedy tokens agree.")
    ] = 0.9,
    push: _Push = None,
    private: _Private = False,
) -> None:
    """Write an adapter as llama.cpp reads it (`llama-server --lora FILE`), or as PEFT does. What PEFT will read is
    compared with the served adapter before it is kept."""
    from onebase_adapters.formats.peft_folder import SIDECAR_FILE, read_object
    from onebase_engine.export.gguf_adapter import write_gguf_adapter
    from onebase_engine.export.lowered_on_base import load_lowered
    from onebase_engine.export.peft_adapter import export_peft

    console = Console(highlight=False, soft_wrap=True)
    spec = BaseSpec(model, device="cpu")
    if to == "peft":
        prompts = _prompts(data, model)
        agreed = export_peft(path, output, spec, prompts, least=least_agreement, progress=console.print)
        console.print(f"of the served adapter's greedy tokens, {agreed:.1%} are PEFT's best, too")
        console.print(f"Wrote {output}")
    else:
        base, adapter = load_lowered(path, spec, console.print)
        count = write_gguf_adapter(base, adapter, output, read_object(path / SIDECAR_FILE))
        for note in adapter.notes:
            console.print(f"note: {note}")
        console.print(f"Wrote {output}: low-rank updates of {count} weights")
    _send(output, push, private=private, console=console)


def _send(output: Path, repo: str | None, *, private: bool, console: Console) -> None:
    """Send what was written to a hub, if it is to go there."""
    from onebase_engine.export.push import push

    if repo is not None:
        console.print(f"Sent to {push(output, repo, private=private)}")


def _prompts(data: Path | None, model: str) -> Sequence[str | Sequence[int]]:
    """Some usual texts, or the prompts of a data file's first examples as they are served."""
    from transformers import AutoTokenizer

    from onebase_engine.base.catalog import fetch_base
    from onebase_engine.export.agreement import TEXTS
    from onebase_training.data import encode, read_dataset

    if data is None:
        return TEXTS
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(model))
    examples = read_dataset(data).examples[:_COMPARED]
    encoded = encode(examples, tokenizer, max_length=2048, too_long="skip")
    return [list(one.input_ids[: one.prompt_length]) for one in encoded if one.prompt_length]


def extract_folders(finetuned: Path, base: str, output: Path, *, rank: int) -> "Extraction":
    """`extract` between two models on disk. Raises BaseModelError, too."""
    from onebase_adapters.extract import FullModel, extract
    from onebase_engine.base.catalog import fetch_base
    from onebase_engine.base.describe import describe_base
    from onebase_engine.base.fingerprint import fingerprint_folder
    from onebase_engine.base.load_base import load_full
    from onebase_engine.base.model_weights import ModelWeights

    folder = fetch_base(base)
    models = [load_full(path) for path in (folder, fetch_base(str(finetuned)))]
    before, after = (FullModel(model, ModelWeights(model)) for model in models)
    shape = describe_base(models[0], base, fingerprint_folder(folder))
    return extract(before, after, shape, output, rank=rank)
