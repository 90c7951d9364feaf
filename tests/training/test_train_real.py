"""The default base: what PEFT makes of the very same examples, how far rounding leads, and a run that learns."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from onebase_contract.events import silent
from onebase_contract.settings import TrainConfig
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import load_base
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_training.data import Encoded, Example, encode
from onebase_training.methods import lora
from onebase_training.model.attached import Attached
from onebase_training.model.base_for_training import load_for_training
from onebase_training.model.frozen_weights import hold
from onebase_training.model.trained_model import Trained
from onebase_training.training_run import train
from support.serving import Feeder, Stream

pytestmark = pytest.mark.real

GOOD = ("great", "lovely", "happy", "excellent", "wonderful", "nice", "brilliant", "good", "perfect", "beautiful")
BAD = ("awful", "terrible", "sad", "horrible", "nasty", "ugly", "boring", "bad", "dreadful", "disgusting")


def test_a_packed_row_has_the_loss_that_peft_has_in_4_bits(tmp_path: Path) -> None:
    """Both in float32, on the same 4-bit weights."""
    examples = [Example(1, prompt=f"The opposite of {word} is", completion=f" not {word}.") for word in GOOD]
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = load_base(BaseSpec(device="cpu"))
    hold(base.model, torch.float32)
    torch.manual_seed(0)
    peer = get_peft_model(base.model, settings).train()
    encoded = encode(examples, base.tokenizer, max_length=64)
    total = 0.0
    with torch.no_grad():
        for one in encoded:
            ids, labels = torch.tensor([one.input_ids]), torch.tensor([one.labels])
            total += float(peer(input_ids=ids, labels=labels).loss) * int((labels != -100).sum())

    config = TrainConfig(data=tmp_path, output=tmp_path, rank=8, device="cpu", arithmetic="float32")
    ours = load_for_training(config, "nf4", "float32", silent)
    torch.manual_seed(0)
    model = Trained(lora.attach(ours, config, 1), ours.device, arithmetic="float32").train()
    with torch.no_grad():
        loss = float(model(**model.collate(encoded)))
    assert loss == pytest.approx(total, rel=1e-4)


@torch.no_grad()
def test_server_and_trainer_stay_close_to_float32_on_the_same_weights(tmp_path: Path) -> None:
    """Log-probabilities of a thousand tokens of ordinary text. Rounding to bfloat16 leads some 0.09 nats off (rms)
    in torch's own pass, too; the trainer's float32 rounds nothing."""
    register_attention()
    served = load_base(BaseSpec(device="cpu"), attention=ATTENTION_NAME)
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids = served.tokenizer(text)["input_ids"][:1024]
    parts = [tuple(ids[start : start + 256]) for start in range(0, len(ids), 256)]
    rows = Feeder(ServedModel(served, slots=1, blocks=64)).logits([Stream(list(part)) for part in parts])
    by_server = torch.cat([logprobs(found[:-1], part) for found, part in zip(rows, parts, strict=True)])

    config = TrainConfig(data=tmp_path, output=tmp_path, device="cpu", arithmetic="float32")
    base = load_for_training(config, "nf4", "float32", silent)
    trained = Trained(Attached(base.model, lambda _: None), base.device, arithmetic="float32").eval()
    found = []
    for part in parts:
        batch = trained.collate([Encoded(part, part, Example(1), 0)])
        del batch["labels"]
        found.append(logprobs(trained.logits(**batch), part))
    by_trainer = torch.cat(found)

    plain = load_base(BaseSpec(device="cpu"))
    hold(plain.model, torch.float32)
    exact = torch.cat([logprobs(plain.model(torch.tensor([part])).logits[0, :-1], part) for part in parts])
    assert float((by_trainer - exact).square().mean().sqrt()) < 1e-3
    assert float((by_server - exact).square().mean().sqrt()) < 0.12


def logprobs(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """The log-probability of each token after the first, by the logits of the one before it."""
    return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_a_short_run_learns_and_its_adapter_loads_in_peft(tmp_path: Path) -> None:
    """Whether a word is good or bad, in one word; tested on words that were not seen."""
    data, held_out = tmp_path / "data.jsonl", tmp_path / "eval.jsonl"
    both = [((good, "good"), (bad, "bad")) for good, bad in zip(GOOD, BAD, strict=True)]
    labelled = [pair for pairs in both for pair in pairs]
    for path, pairs in ((data, labelled[:14]), (held_out, labelled[14:])):
        rows = [{"prompt": f"It was {word}. =>", "completion": f" {label}"} for word, label in pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    config = TrainConfig(data=data, eval_data=held_out, output=output, batch_tokens=140, epochs=12, device="cpu")
    result = train(config)
    assert result.after.loss < 0.5 * result.before.loss
    assert result.after.score is not None and result.before.score is not None
    assert result.after.score.value > result.before.score.value
    peer = PeftModel.from_pretrained(load_base(BaseSpec(device="cpu")).model, output)
    assert sum(value.numel() for name, value in peer.named_parameters() if "lora_" in name) == result.parameters
