"""Which kernels a model gets, and what is said where they are the slow ones."""

import importlib.util
import logging
import re
import shutil
from collections.abc import Callable

import pytest
import torch

from onebase_engine.kernels.choose import choose_kernels
from onebase_engine.kernels.cpu import backend as cpu
from onebase_engine.kernels.cpu import target
from onebase_engine.kernels.reference import backend as reference

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "widths", "fast"),
    [
        (torch.bfloat16, 64, [576, 1536], True),
        (torch.float32, 64, [576, 1536], False),
        (torch.bfloat16, 24, [576, 1536], False),
        (torch.bfloat16, 64, [576, 1537], False),
    ],
)
def test_on_cpus(dtype: torch.dtype, head_dim: int, widths: list[int], fast: bool) -> None:
    assert choose_kernels(CPU, dtype, head_dim, widths) is (cpu if fast else reference)


def test_on_cpus_that_lack_something(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(target, "TARGET", target.PLAIN)
    with caplog.at_level(logging.WARNING):
        assert choose_kernels(CPU, torch.bfloat16, 64, [576]) is reference
    assert "without AVX2 and FMA" in caplog.text


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has all it takes; what is patched further, it lacks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def test_on_gpus(gpu: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from onebase_engine.kernels.cuda import backend as cuda

    assert choose_kernels(GPU, torch.bfloat16, 128, [4096]) is cuda


@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)), "older than Ampere"),
        (lambda m: m.setattr(importlib.util, "find_spec", lambda name: None), "pip install 'onebase\\[cuda\\]'"),
        (lambda m: (m.setattr(shutil, "which", lambda name: None), m.delenv("CC", False)), "install gcc"),
    ],
)
def test_on_gpus_that_lack_something(
    lack: Callable[[pytest.MonkeyPatch], object],
    reason: str,
    gpu: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lack(gpu)
    with caplog.at_level(logging.WARNING):
        assert choose_kernels(GPU, torch.bfloat16, 128, [4096]) is reference
    assert re.search(reason, caplog.text)
