"""The model under training: the frozen base with a method's parameters on it, from a packed row to its loss.

The invariant: a row's loss is the sum of the losses that its examples have alone. Logits are made only where there
is a label, since a small model's head costs as much as a fifth of its layers, and few tokens of a row are learned.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from onebase_contract.settings import Arithmetic
from onebase_engine.base.describe import decoder_start
from onebase_training.data import Encoded
from onebase_training.model.attached import Attached
from onebase_training.model.collate import Collator
from onebase_training.model.encoder_decoder_batches import PairCollator
from onebase_training.model.packed_attention import PACKED_ATTENTION, Bounds, Packing


class Trained(nn.Module):
    """The module that the trainer optimises. Parameters that take no gradient are the base's."""

    def __init__(
        self,
        attached: Attached,
        device: torch.device,
        *,
        first_position: int = 0,
        arithmetic: Arithmetic = "bf16",
    ) -> None:
        super().__init__()
        self.attached = attached
        self.model = attached.model
        self.extra = attached.extra
        self.head = attached.head.linear if attached.head else None
        self.device = device
        self.first_position = first_position
        """The first position of a sequence in the model's table of positions."""
        self.arithmetic: Arithmetic = arithmetic
        """Number format of matrix products; trained parameters are float32."""
        self.paired: bool = attached.model.config.is_encoder_decoder
        """Whether the base is an encoder-decoder, with padded batches instead of packed rows."""
        self.collate = (
            PairCollator(self.vocab, attached.places, decoder_start=decoder_start(attached.model))
            if self.paired
            else Collator(self.vocab, attached.places, ahead=attached.head is None)
        )

    @property
    def vocab(self) -> int:
        """Rows of the input embedding."""
        size: int = self.model.config.get_text_config().vocab_size
        return size

    @property
    def outputs(self) -> int:
        """Logits of a label."""
        return len(self.attached.head.classes) if self.attached.head else self.vocab

    def length(self, example: Encoded) -> int:
        """Tokens of an example in a row, virtual ones included."""
        return len(example.input_ids) + len(self.attached.places)

    def recompute_activations(self) -> None:
        """Keep only each layer's input for the backward pass (Chen et al. 2016): slower, far less memory."""
        base: Any = self.model
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(self, labels: torch.Tensor | None = None, **batch: torch.Tensor) -> torch.Tensor:
        """The batch's summed loss in nats, a float32 scalar; without labels its `logits`. Shapes as `collate` makes
        them."""
        logits = self.logits(**batch)
        return logits if labels is None else cross_entropy(logits, labels, reduction="sum")

    def logits(self, **batch: torch.Tensor) -> torch.Tensor:
        """float32 [M, vocab] or [M, classes] of a batch's `rows`."""
        return self._pair_logits(**batch) if self.paired else self._row_logits(**batch)

    def _pair_logits(
        self, input_ids: torch.Tensor, seen: torch.Tensor, decoder_ids: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        with self.precision():
            made: torch.Tensor = self.model(
                **self.embedded(input_ids), attention_mask=seen, decoder_input_ids=decoder_ids, use_cache=False
            ).logits
        return made.flatten(0, 1)[rows].float()

    def _row_logits(self, input_ids: torch.Tensor, bounds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        places: list[int] = bounds.tolist()
        inputs = self._packed(list(pairwise(places)), input_ids.device)
        with self.precision():
            inputs |= self.embedded(input_ids[None])
            if self.attached.prefix is not None:
                inputs["past_key_values"] = self.attached.prefix(1)
            if self.attached.head is None:
                made: torch.Tensor = self.model(use_cache=False, logits_to_keep=rows, **inputs).logits[0]
            else:
                made = self._classify(self._hidden(inputs), rows, places)
        return made.float()

    def precision(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.arithmetic == "bf16")

    def embedded(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's arguments for ids [B, T], virtual tokens among them or not."""
        if self.attached.virtual is None:
            return {"input_ids": ids}
        embedding: Any = self.model.get_input_embeddings()
        virtual = ids >= self.vocab
        embeds = embedding(ids.masked_fill(virtual, 0))
        own = self.attached.virtual().to(embeds.dtype)
        return {"inputs_embeds": torch.where(virtual[..., None], own[(ids - self.vocab).clamp(min=0)], embeds)}

    def _hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        """[N, hidden] after the last norm."""
        backbone: Any = self.model.base_model
        hidden: torch.Tensor = backbone(use_cache=False, **inputs).last_hidden_state[0]
        return hidden

    def _classify(self, hidden: torch.Tensor, rows: torch.Tensor, places: list[int]) -> torch.Tensor:
        """[M, classes]. A sequence has one label, at its last token, wherever its head looks."""
        head = self.attached.head
        if head is None:
            raise TypeError("no head")
        if head.kind == "sequence" and head.pooling == "mean":
            chosen = torch.stack([hidden[start:end].mean(0) for start, end in pairwise(places)])
        elif head.kind == "sequence" and head.pooling == "first":
            chosen = hidden[places[:-1]]
        else:
            chosen = hidden[rows]
        logits: torch.Tensor = head.linear(chosen)
        return logits

    def _packed(self, examples: Bounds, device: torch.device) -> dict[str, Any]:
        """Return the arguments that tell the model where examples begin and end."""
        prefix = self.attached.prefix_length
        first = prefix + self.first_position
        lengths = torch.tensor([end - start for start, end in examples], device=device)
        starts = torch.tensor([start for start, _ in examples], device=device)
        positions = torch.arange(int(lengths.sum()), device=device) - starts.repeat_interleave(lengths) + first
        if self.model.config._attn_implementation == PACKED_ATTENTION:
            return {"position_ids": positions[None], "packing": Packing(examples)}
        return {"position_ids": positions[None], "attention_mask": _block_mask(lengths, prefix)}


def _block_mask(lengths: torch.Tensor, prefix: int) -> torch.Tensor:
    """[1, 1, N, prefix + N], true where a query may see a key: the prefix, and before it within its example."""
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    own = (owner[:, None] == owner[None, :]).tril()
    return nn.functional.pad(own, (prefix, 0), value=True)[None, None]


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that take gradients, by name, as they are (no copy)."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
