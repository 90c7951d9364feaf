"""The model under training: the frozen base with a method's parameters on it, from a packed row to its loss.

The invariant: a row's loss is the sum of the losses that its examples have alone. Logits are made only where there
is a label, since a small model's head costs as much as a fifth of its layers, and few tokens of a row are learned.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from onebase_training.attention import PACKED_ATTENTION, Bounds, Packing
from onebase_training.methods.attached import Attached


class Trained(nn.Module):
    """What the trainer optimises. Parameters that take no gradient are the base's."""

    def __init__(self, attached: Attached, device: torch.device, *, mixed_precision: bool = True) -> None:
        super().__init__()
        self.attached = attached
        self.model = attached.model
        self.device = device
        self.mixed_precision = mixed_precision
        """Matrix products in bfloat16 (trained parameters stay float32)."""

    @property
    def vocab(self) -> int:
        """Logits of a token."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    def recompute_activations(self) -> None:
        """Keep only each layer's input for the backward pass (Chen et al. 2016): slower, far less memory."""
        base: Any = self.model
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(
        self, input_ids: torch.Tensor, bounds: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The row's summed loss in nats, a float32 scalar. Shapes as `batches.collate` makes them."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision):
            logits = self.logits(input_ids, bounds, rows)
        return cross_entropy(logits.float(), labels, reduction="sum")

    def logits(self, input_ids: torch.Tensor, bounds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[M, vocab] at `rows` of the packed row."""
        places: list[int] = bounds.tolist()
        examples = list(pairwise(places))
        inputs = self._inputs(examples, input_ids.device)
        output = self.model(input_ids=input_ids[None], use_cache=False, logits_to_keep=rows, **inputs)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _inputs(self, examples: Bounds, device: torch.device) -> dict[str, Any]:
        """What tells the model where examples begin and end."""
        lengths = torch.tensor([end - start for start, end in examples], device=device)
        starts = torch.tensor([start for start, _ in examples], device=device)
        positions = torch.arange(int(lengths.sum()), device=device) - starts.repeat_interleave(lengths)
        if self.model.config._attn_implementation == PACKED_ATTENTION:
            return {"position_ids": positions[None], "packing": Packing(examples)}
        return {"position_ids": positions[None], "attention_mask": _block_mask(lengths)}


def _block_mask(lengths: torch.Tensor) -> torch.Tensor:
    """[1, 1, N, N], true where a query may see a key: causal, within its example."""
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return (owner[:, None] == owner[None, :]).tril()[None, None]


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that take gradients, by name, as they are (no copy)."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
