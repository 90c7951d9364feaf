"""Trained here, served there: whether a server says of held-out answers what the trainer's own forward pass says.

    python -m benchmarks.agreement [--methods qlora,ia3] [--steps 4] [--examples 8] [--markdown FILE]
    python -m benchmarks.agreement --adapter FOLDER --data FILE [--bases ONE,OTHER]

The first trains every method of `onebase methods` for a few steps, and puts held-out answers, token by token, to
the model that was trained and to the engine that serves what was written. The second puts them to one adapter on
two forms of its base. For each learned token both give their likeliest tokens; the table has the mean
Kullback-Leibler divergence over those that both name, and all others as one: a lower bound, and close, since they
hold nearly all of the probability. A classifier's classes are all compared. Greedy agreement is the share of the
tokens whose likeliest next one is the same.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, set_seed

from examples.prepare import prepare
from onebase import LLM, SamplingParams
from onebase_adapters.errors import AdapterError, DataError
from onebase_contract.events import silent
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_training.data import NO_LOSS, Encoded, encode, read_dataset
from onebase_training.data.encoding.encode_template import encode_with, raw
from onebase_training.fitting.distributed import ALONE
from onebase_training.fitting.training_loop import Loop
from onebase_training.methods.attach import METHODS, find_method
from onebase_training.methods.classification_head import with_head
from onebase_training.methods.hard_prompt import choose, write_template
from onebase_training.model.attached import Attached
from onebase_training.model.trained_model import Trained
from onebase_training.result_folder import write_adapter
from onebase_training.run_plan import RunPlan, make_plan

_TOP = 256
"""Tokens that each side names."""
_LEAST = 1e-6
"""The least that all tokens which are not named may have together."""

Said = Sequence[Mapping[int, float]]
"""For each learned token or class, the likeliest ones with their log-probabilities, in nats."""


@dataclass(frozen=True)
class Row:
    """How two sides compare; nan where the server refuses the adapter."""

    name: str
    trained_on: str
    served_on: str
    tokens: int
    divergence: float
    """Nats a token."""
    agreement: float


def compare(name: str, trained_on: str, served_on: str, one: Said, other: Said) -> Row:
    """One side's divergence from the other, and how often both find the same likeliest."""
    pairs = list(zip(one, other, strict=True))
    same = sum(max(p, key=p.__getitem__) == max(q, key=q.__getitem__) for p, q in pairs)
    mean = sum(_divergence(p, q) for p, q in pairs) / len(pairs)
    return Row(name, trained_on, served_on, len(pairs), mean, same / len(pairs))


def _divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """sum p (log p - log q) in nats."""
    both = p.keys() & q.keys()
    left = [max(1 - math.fsum(math.exp(side[token]) for token in both), _LEAST) for side in (p, q)]
    named = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in both)
    return named + left[0] * math.log(left[0] / left[1])


def train_and_compare(config: TrainConfig, examples: int) -> list[Row]:
    """Train for a few steps and compare, on the base as it is served by default and, where training had it in
    another form, in that one as well."""
    set_seed(config.seed)
    plan = make_plan(config, silent, ALONE)
    folder = config.output / "adapter"
    folder.mkdir(parents=True)
    model, held_out = _choose(plan, folder) if plan.method.attach is None else _fit(plan, folder)
    held_out = held_out[:examples]
    trained = list(_trainer_says(model, held_out))
    rows = []
    for quantization in dict.fromkeys(("nf4", plan.method.quantization)):
        spec = replace(plan.served, quantization=quantization)
        if config.method == "full":
            spec, adapter = replace(spec, model=str(folder)), None
        else:
            adapter = folder
        on, by = ("bfloat16" if each == "none" else each for each in (plan.method.quantization, quantization))
        try:
            served = list(server_says(spec, adapter, held_out, classes=model.attached.head is not None))
        except AdapterError as error:
            print(f"{config.method} is not served: {error}", flush=True)
            rows.append(Row(config.method, on, "refused", 0, math.nan, math.nan))
        else:
            rows.append(compare(config.method, on, by, trained, served))
    return rows


def _fit(plan: RunPlan, folder: Path) -> tuple[Trained, Sequence[Encoded]]:
    if plan.method.attach is None:
        raise TypeError("no parameters")
    attached = plan.method.attach(plan.base, plan.config, plan.batches.steps)
    if plan.config.head:
        attached = with_head(attached, plan.base, plan.dataset, plan.config)
    model = plan.trained(attached)
    work = plan.config.output / "work"
    work.mkdir()
    parts = {"examples": plan.examples, "held_out": plan.evaluation[:1], "batches": plan.batches}
    Loop(model, plan.config, work=work, progress=silent, **parts).train()  # type: ignore[arg-type]
    write_adapter(folder, attached.save, {**plan.notes(), **attached.notes})
    return model, plan.evaluation


def _choose(plan: RunPlan, folder: Path) -> tuple[Trained, Sequence[Encoded]]:
    model = plan.trained(Attached(plan.base.model, lambda _: None))
    template = choose(model, plan.base, plan.dataset, plan.config, silent)
    write_template(template, folder, plan.base.shape.hub_id)
    shown = encode_with(template, plan.held_out.examples, plan.base.tokenizer, plan.base.shape.context)
    if shown is None:
        raise DataError("The chosen prompt leaves no room for the longest held-out example.", field="max_length")
    return model, shown


@torch.inference_mode()
def _trainer_says(model: Trained, examples: Sequence[Encoded]) -> Iterator[dict[int, float]]:
    """By the pass that the trainer's losses are from."""
    model.eval()
    for example in examples:
        batch = {name: value.to(model.device) for name, value in model.collate([example]).items()}
        batch.pop("labels")
        for row in model.logits(**batch).log_softmax(-1):
            found = row.topk(min(_TOP, len(row)))
            yield dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def server_says(
    spec: BaseSpec, adapter: Path | None, examples: Sequence[Encoded], *, classes: bool = False
) -> Iterator[dict[int, float]]:
    """By `onebase.LLM`, asked for the log-probabilities of the prompt, or for the classes of a text."""
    name = None if adapter is None else "adapter"
    with LLM(
        spec.model,
        {} if adapter is None else {"adapter": adapter},
        quantization=spec.quantization,
        device=spec.device,
        cache_gib=0.5,
    ) as llm:
        if classes:
            for output in llm.classify([one.input_ids for one in examples], "adapter"):
                for row in output.probabilities:
                    yield {number: math.log(max(value, 1e-30)) for number, value in enumerate(row)}
            return
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=_TOP)
        template = llm.adapters["adapter"].template if name else None
        for one in examples:
            if template is not None:  # its text is in the tokens already, which must be those that users get
                [sent] = llm.generate([raw(one.example)[0]], SamplingParams(max_tokens=1), name)
                if sent.prompt_token_ids != one.input_ids[: one.prompt_length]:
                    raise RuntimeError(f"the server reads another prompt: {sent.prompt!r}")
            [output] = llm.generate([one.input_ids], asked, name if template is None else None)
            for label, entry in zip(one.labels, output.prompt_logprobs or (), strict=True):
                if label != NO_LOSS and entry is not None:
                    yield dict(entry.top)


def on_two_bases(adapter: Path, data: Path, bases: Sequence[str], examples: int) -> Row:
    """One adapter on two forms of its base."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(bases[0]))
    encoded = encode(read_dataset(data).examples[:examples], tokenizer, max_length=1024, too_long="skip")
    one, other = (list(server_says(BaseSpec(base), adapter, encoded)) for base in bases)
    return compare(adapter.name, *bases, one, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--model", default=DEFAULT_BASE)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument(
        "--data", default="address-fields", help="a recipe of `python -m examples.prepare`, or a file"
    )
    parser.add_argument("--labels", default="tweets", help="likewise, for methods that train a classifier")
    parser.add_argument("--rows", type=int, default=30, help="rows of a recipe, of which 30% are held out")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--adapter", type=Path, help="compare this one on two bases")
    parser.add_argument("--bases", default=f"{DEFAULT_BASE},{DEFAULT_BASE}-q4_1")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if options.adapter is not None:
            data = _file(options.data, options.rows, work)
            rows.append(on_two_bases(options.adapter, data, options.bases.split(","), options.examples))
        else:
            for name in options.methods.split(","):
                data = options.labels if find_method(name).head else options.data
                config = TrainConfig(
                    data=_file(data, options.rows, work),
                    output=work / name,
                    method=name,
                    model=options.model,
                    max_steps=max(options.steps, 6) if name == "adalora" else options.steps,
                    eval_every=10**6,
                    eval_fraction=0.3,
                    batch_tokens=256,
                    too_long="skip",
                )
                found = train_and_compare(config, options.examples)
                print(*found, sep="\n", flush=True)
                rows += found
    show(rows, options.markdown)


def _file(data: str, rows: int, work: Path) -> Path:
    """A file itself, or the first rows of a recipe."""
    if Path(data).is_file():
        return Path(data)
    folder = work / f"data-{data}"
    if not folder.is_dir():
        prepare(data, folder, limit=rows, eval_limit=1, progress=lambda _: None)
    return folder / "train.jsonl"


def show(rows: Sequence[Row], markdown: Path | None) -> None:
    """The table, in the terminal and as a file."""
    heads = ("method", "trained on", "served on", "tokens", "nats a token", "greedy agreement")
    cells = [
        (
            *(row.name, row.trained_on, row.served_on, str(row.tokens)),
            *(f"{row.divergence:.1e}", f"{row.agreement:.1%}"),
        )
        for row in rows
    ]
    table = Table(*heads)
    for line in cells:
        table.add_row(*line)
    Console().print(table)
    if markdown is not None:
        lines = [heads, ("---",) * len(heads), *cells]
        markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
