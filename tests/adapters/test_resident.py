"""Adapters coming into memory and leaving it."""

import pytest
import torch

from onebase_adapters.errors import AdapterError
from onebase_adapters.primitives.instruction_set import LowRank, Shift
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.kernels.arena import Arena
from onebase_engine.kernels.tables import AffineTable
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from support.batches import random_bf16
from support.models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = save_model(tmp_path_factory.mktemp("base"), "llama")
    return ServedModel.load(BaseSpec(str(folder), device="cpu"), slots=2, blocks=8)


def adapter(model: ServedModel, seed: int) -> LoweredAdapter:
    primitives: list[LowRank | Shift] = []
    for n, site in enumerate(model.shape.sites.values()):
        a, b = random_bf16(seed + n, 4, site.in_features), random_bf16(seed - n, site.out_features, 4)
        primitives += [LowRank(site.name, a, b, 0.1), Shift(site.name, b[:, 0])]
    return LoweredAdapter(str(seed), "lora", tuple(primitives))


def logits(model: ServedModel, slot: int) -> torch.Tensor:
    return model.forward([Chunk([3, 1, 4], 0, [0], slot)]).logits([0])


def test_one_that_leaves_changes_nothing_any_more(model: ServedModel) -> None:
    plain = logits(model, 0)
    slot = model.put(adapter(model, 1))
    assert model.slot_bytes(slot) > 0
    changed = logits(model, slot)
    assert not torch.equal(changed, plain)
    model.remove(slot)
    assert torch.equal(logits(model, slot), plain)
    again = model.put(adapter(model, 1))
    assert torch.equal(logits(model, again), changed)
    model.remove(again)


def test_logits_of_some_rows_are_those_of_all(model: ServedModel) -> None:
    """Also where the LM head itself has an adapter."""
    slot = model.put(adapter(model, 1))
    for changed in (slot, 0):
        chunks = [Chunk([3], 0, [0], 0), Chunk([1, 4], 0, [1], changed), Chunk([5], 0, [2], 0)]
        whole = model.forward(chunks).logits([0, 1, 2])
        for rows in ([1], [2, 1]):
            assert torch.equal(model.forward(chunks).logits(rows), whole[rows])
            assert model.forward(chunks).best(rows) == whole[rows].argmax(-1).tolist()
    model.remove(slot)


def test_no_slot_is_left(model: ServedModel) -> None:
    slots = [model.put(adapter(model, seed)) for seed in (1, 2)]
    with pytest.raises(IndexError):
        model.put(adapter(model, 3))
    for slot in slots:
        model.remove(slot)


@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("where", [(Arena, "__init__"), (Arena, "hold"), (AffineTable, "put")])
def test_no_memory_is_left(
    model: ServedModel, error: Exception, where: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = logits(model, 0)
    calls = 0
    real = getattr(*where)

    def fail_late(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5 or where[1] == "__init__":
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(*where, fail_late)
    with pytest.raises(AdapterError, match=r"cannot be brought into memory: .*memory"):
        model.put(adapter(model, 1))
    monkeypatch.undo()
    assert model.free_slots == 2
    for slot in (1, 2):
        assert torch.equal(logits(model, slot), plain)
