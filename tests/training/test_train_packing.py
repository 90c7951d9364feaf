"""A packed row: no example sees another, in any family, and no gradient changes."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig
from onebase_training.data import NO_LOSS, Encoded, Example
from onebase_training.data.encoding.packing import pack, passes_of, plan_batches, plan_examples, tokens_of_pass
from onebase_training.model.attached import Attached
from onebase_training.model.base_for_training import beyond_masks
from onebase_training.model.collate import Collator
from onebase_training.model.packed_attention import PACKED_ATTENTION
from onebase_training.model.trained_model import Trained, trainable_state
from support import models

FAMILIES = (
    "llama",
    "llama-odd",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt2",
    "glm",
    "phi3-partial",
    "qwen2-window",
)


def example(*ids: int, prompt: int = 1) -> Encoded:
    labels = (NO_LOSS,) * prompt + ids[prompt:]
    return Encoded(ids, labels, Example(1), prompt)


def some_examples(vocab: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    lengths = {5: 2, 40: 30, 1: 0, 17: 1}
    return [
        example(*torch.randint(vocab, (length,), generator=generator).tolist(), prompt=prompt)
        for length, prompt in lengths.items()
    ]


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, PACKED_ATTENTION) for family in FAMILIES),
        *((family, "sdpa") for family in FAMILIES if not beyond_masks(models.FAMILIES[family](64))),
    ],
)
def test_a_packed_row_has_the_losses_and_gradients_of_its_examples_alone(
    family: str, attention: str, tiny_model: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(family), dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    peft = get_peft_model(model, settings)
    examples = some_examples(peft.config.vocab_size)
    total = torch.zeros(())
    for one in examples:
        if len(one.input_ids) > 1:
            ids, labels = torch.tensor([one.input_ids]), torch.tensor([one.labels])
            total = total + peft(input_ids=ids, labels=labels).loss * int((labels[:, 1:] != NO_LOSS).sum())
    total.backward()
    base = peft.get_base_model()
    expected = {name: value.grad.clone() for name, value in trainable_state(base).items()}
    base.zero_grad()

    base.set_attn_implementation(attention)
    trained = Trained(Attached(base, lambda _: None), torch.device("cpu"), arithmetic="float32")
    loss = trained(**trained.collate(examples))
    loss.backward()
    torch.testing.assert_close(loss, total)
    for name, value in trainable_state(base).items():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_a_label_stands_in_the_row_before_its_token() -> None:
    batch = Collator()([example(7, 8, 9, prompt=2), example(4, 5, prompt=1)])
    assert batch["input_ids"].tolist() == [7, 8, 9, 4, 5]
    assert batch["bounds"].tolist() == [0, 3, 5]
    assert batch["rows"].tolist() == [1, 3]
    assert batch["labels"].tolist() == [9, 5]


def test_batches_keep_to_the_budget_and_the_order() -> None:
    assert pack([0, 1, 2, 3], [4, 6, 50, 1], 10) == [[0, 1], [2], [3]]


def test_a_plan_has_each_example_once_an_epoch_in_an_order_of_its_own() -> None:
    lengths = [1 + index % 7 for index in range(50)]
    plan = plan_batches(lengths, budget=16, epochs=2.5, seed=1)
    flat = [index for batch in plan for index in batch]
    assert sorted(flat[:50]) == sorted(flat[50:100]) == list(range(50))
    assert flat[:50] != flat[50:100]
    assert len(flat) == 125
    assert all(sum(lengths[index] for index in batch) <= 16 for batch in plan)
    assert plan == plan_batches(lengths, budget=16, epochs=2.5, seed=1)
    assert plan != plan_batches(lengths, budget=16, epochs=2.5, seed=2)


def test_a_plan_in_examples_has_so_many_in_each_step_across_epochs() -> None:
    lengths = [1 + index % 7 for index in range(50)]
    plan = plan_examples(lengths, 4, epochs=2.5, seed=1)
    assert [len(batch) for batch in plan] == [4] * 31 + [1]
    flat = [index for batch in plan for index in batch]
    by_tokens = plan_batches(lengths, budget=16, epochs=2.5, seed=1)
    assert flat == [index for batch in by_tokens for index in batch]


def test_a_step_takes_the_fewest_equal_passes_that_fit() -> None:
    lengths = [10, 30]
    assert passes_of(lengths, 8, budget=160) == 1
    assert passes_of(lengths, 8, budget=159) == 2
    assert passes_of(lengths, 6, budget=60) == 2
    assert passes_of(lengths, 7, budget=60) == 7
    assert passes_of(lengths, 8, budget=1) == 8
    assert passes_of(lengths, 8, budget=40, world=2) == 2
    with pytest.raises(ConfigError, match="no multiple of the 3 processes"):
        passes_of(lengths, 8, budget=40, world=3)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_several_blocks_and_a_prefix_is_plain_attention(causal: bool) -> None:
    from onebase_training.model.packed_attention import Packing, _Packed

    generator = torch.Generator().manual_seed(0)
    bounds, prefix = (0, 300, 311, 400, 495, 580, 900), 3
    q = torch.randn(4, 900, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, prefix + 900, 8, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, 900, 8, generator=generator)
    out = _Packed.apply(q, k, v, Packing(list(pairwise(bounds))), 0.3, causal, None, None)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))

    visible = torch.zeros(900, prefix + 900, dtype=torch.bool)
    visible[:, :prefix] = True
    for start, end in pairwise(bounds):
        visible[start:end, prefix + start : prefix + end] = True
    if causal:
        visible[:, prefix:] &= torch.ones(900, 900, dtype=torch.bool).tril()
    scores = q @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.3
    plain = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got, torch.autograd.grad((plain * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "options", "tokens"),
    [
        ([9, 11], {}, 256),
        ([60, 80], {}, 560),
        ([200, 300], {}, 1024),
        ([20, 40], {"batch_tokens": 77}, 77),
        ([20, 40], {"batch_size": 4}, 1024),
    ],
)
def test_short_examples_make_small_passes(lengths: list[int], options: dict[str, int], tokens: int) -> None:
    assert tokens_of_pass(lengths, TrainConfig(data=Path("a"), output=Path("b"), **options)) == tokens
