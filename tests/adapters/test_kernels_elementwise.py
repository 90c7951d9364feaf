"""The small fused operations against transformers' modules, and the same for few rows (serial) and many."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.functional import silu
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_halves

from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.cpu import backend
from onebase_engine.kernels.cpu.attention import NO_WINDOW, exp_nonpositive
from onebase_engine.kernels.cpu.elementwise import SERIAL_ROWS, add_rms_norm, gate_mul, rope_attend
from support.batches import deal_pages, make_batch, random_bf16

rows_and_width = {"rows": st.integers(1, 3 * SERIAL_ROWS), "width": st.integers(1, 200)}


def norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    behind: torch.Tensor | None = None,
    gemma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its norm), by our kernel."""
    x, out = x.clone(), torch.empty_like(x)
    delta = None if delta is None else delta.clone()
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (delta, behind)]
    add_rms_norm(x.data_ptr(), *pointers, weight.data_ptr(), gemma, out.data_ptr(), *x.shape, 1e-5)
    return x, out


@given(**rows_and_width, added=st.booleans())
def test_the_norm_is_llamas(rows: int, width: int, added: bool) -> None:
    x, delta = random_bf16(1, rows, width), random_bf16(2, rows, width) if added else None
    module = LlamaRMSNorm(width, 1e-5)
    module.weight.data = random_bf16(3, width)
    summed, normed = norm(x, delta, module.weight)
    right = x if delta is None else x + delta
    assert torch.equal(summed, right)
    # The mean's last bit may move a number to the next bfloat16.
    torch.testing.assert_close(normed, module(right), rtol=2**-7, atol=1e-6)


@given(**rows_and_width)
def test_a_rows_norm_does_not_depend_on_how_many_there_are(rows: int, width: int) -> None:
    x, delta, weight = random_bf16(1, rows, width), random_bf16(2, rows, width), random_bf16(3, width)
    together = norm(x, delta, weight)[1]
    for row in range(rows):
        alone = norm(x[row : row + 1], delta[row : row + 1].contiguous(), weight)[1]
        assert torch.equal(alone[0], together[row])


@given(**rows_and_width, added=st.booleans())
def test_the_norms_before_and_behind_are_gemmas(rows: int, width: int, added: bool) -> None:
    x, delta = random_bf16(1, rows, width), random_bf16(2, rows, width)
    modules = [Gemma3RMSNorm(width, 1e-5) for _ in range(2)]
    for seed, module in enumerate(modules):
        module.weight.data = random_bf16(3 + seed, width)
    behind, before = (module.weight for module in modules)
    summed, normed = norm(x, delta if added else None, before, behind=behind, gemma=True)
    right = x + modules[0](delta) if added else x
    torch.testing.assert_close(summed, right, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(normed, modules[1](summed), rtol=2**-7, atol=1e-6)


def gate(gate_up: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=torch.bfloat16)
    gate_mul(gate_up.data_ptr(), gelu, out.data_ptr(), rows, width)
    return out


@given(**rows_and_width, gelu=st.booleans())
def test_the_gate_is_the_activation_times_up(rows: int, width: int, gelu: bool) -> None:
    gate_up = random_bf16(1, rows, 2 * width, scale=4)
    found = gate(gate_up, gelu=gelu)
    activated = functional.gelu(gate_up[:, :width], approximate="tanh") if gelu else silu(gate_up[:, :width])
    torch.testing.assert_close(found, activated * gate_up[:, width:], rtol=2**-7, atol=1e-5)
    for row in range(rows):
        assert torch.equal(gate(gate_up[row : row + 1], gelu=gelu)[0], found[row])


@pytest.mark.parametrize("gelu", [False, True])
def test_the_gate_takes_very_large_numbers(gelu: bool) -> None:
    values = [0.0, -0.0, 100.0, -100.0, 1e30, -1e30, torch.inf, torch.nan]
    gate_up = torch.tensor([values + [1.0] * len(values)]).bfloat16()
    numbers = gate_up[:, : len(values)]
    expected = functional.gelu(numbers, approximate="tanh") if gelu else silu(numbers)
    torch.testing.assert_close(gate(gate_up, gelu=gelu), expected, rtol=2**-7, atol=1e-7, equal_nan=True)


def test_the_exponential_is_within_two_units_of_the_last_place() -> None:
    x = np.linspace(-87, 0, 20_001).astype(np.float32)
    right = np.exp(x.astype(np.float64))
    found = np.array([exp_nonpositive(value) for value in x], np.float64)
    assert np.max(np.abs(found - right) / np.spacing(right.astype(np.float32))) <= 2


@pytest.mark.parametrize("tokens", [1, SERIAL_ROWS, SERIAL_ROWS + 1, 33])
@pytest.mark.parametrize(
    ("dim", "turned", "rotate", "by_head"),
    [
        (16, 16, rotate_halves, False),
        (64, 64, rotate_halves, False),
        (64, 64, rotate_halves, True),
        (64, 48, rotate_halves, False),
        (64, 32, rotate_neighbours, False),
        (16, 16, rotate_neighbours, True),
    ],
)
def test_rotation_write_and_attention_in_one_are_the_three_in_a_row(
    tokens: int, dim: int, turned: int, rotate: Callable, by_head: bool
) -> None:
    heads, kv_heads, start = 6, 2, 5
    total = start + tokens
    pages = deal_pages([total], 1, 16)
    caches = [torch.zeros(16, kv_heads, dim, BLOCK).bfloat16(), torch.zeros(16, kv_heads, BLOCK, dim).bfloat16()]
    before = make_batch([(0, start)], backend, kv_heads, pages)
    backend.write_kv(random_bf16(1, start, kv_heads, dim), random_bf16(2, start, kv_heads, dim), *caches, before)
    batch = make_batch([(start, tokens)], backend, kv_heads, pages)
    qkv = random_bf16(3, tokens, (heads + 2 * kv_heads) * dim)
    angles = torch.outer(torch.arange(total).float(), 100.0 ** -(torch.arange(turned // 2) / turned))
    cos, sin = torch.cat([angles, angles], -1).cos().bfloat16(), torch.cat([angles, angles], -1).sin().bfloat16()

    q, k, v = qkv.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    weights = [random_bf16(seed, dim) for seed in (4, 5)]
    if by_head:
        q, k = (
            norm(part.reshape(-1, dim), None, weight)[1].view(part.shape)
            for part, weight in zip((q, k), weights, strict=True)
        )
    q, k = rotate(q, k, cos[start:], sin[start:], unsqueeze_dim=1)
    apart = [cache.clone() for cache in caches]
    backend.write_kv(k.contiguous(), v.contiguous(), *apart, batch)
    expected = backend.attend(q.contiguous(), *apart, batch, 0.25)

    out = torch.empty(tokens, heads, dim, dtype=torch.bfloat16)
    norms = [weight.data_ptr() if by_head else 0 for weight in weights]
    rope_attend(
        qkv.data_ptr(), *norms, False, 1e-5, cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
        caches[0].data_ptr(), caches[1].data_ptr(), heads, kv_heads, dim, turned, rotate is rotate_neighbours,
        0.25, NO_WINDOW,
        batch.cache_slots, batch.items, batch.positions, batch.visible, batch.tables,
    )  # fmt: skip
    assert torch.equal(out, expected)
    assert torch.equal(caches[0], apart[0])
    assert torch.equal(caches[1], apart[1])
