"""What one would do without a server: transformers' generate(), alone and with PEFT's mixed-adapter batch, on
the very same NF4 base."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.load_base import LoadedBase, load_base


def load_peer(spec: BaseSpec) -> LoadedBase:
    """The base as transformers serves it, with its fastest attention."""
    return load_base(spec, attention="sdpa")


@torch.inference_mode()
def generate_seconds(model: Any, prompts: torch.Tensor, new_tokens: int, **options: Any) -> float:
    """Seconds of one generate() call; prompts [n, length]."""
    _wait()
    started = time.perf_counter()
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )
    if out.shape[1] != prompts.shape[1] + new_tokens:
        raise RuntimeError(f"generate() made {out.shape[1] - prompts.shape[1]} tokens, not {new_tokens}")
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def prefill_seconds(model: Any, prompt: torch.Tensor) -> float:
    """Seconds of one forward pass over a prompt [1, length], logits of the last token only."""
    started = time.perf_counter()
    model(prompt, logits_to_keep=1)
    return time.perf_counter() - started


def with_adapters(base: LoadedBase, folders: Sequence[Path]) -> Any:
    """The base as PEFT wraps it, with all the adapters loaded under their folders' names."""
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # PEFT's own
    model = PeftModel.from_pretrained(base.model, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()
