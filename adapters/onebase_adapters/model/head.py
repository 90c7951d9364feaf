"""From a step's last hidden states to tokens: all logits for those who need them, just the best for the others."""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from onebase_adapters.kernels.cpu.packed import PackedLinear, fits_packed, packable
from onebase_adapters.kernels.cpu.screen import UNSURE, best_tokens, settle_unsure
from onebase_adapters.model.noise import Noise

log = logging.getLogger(__name__)

HeadKind = Literal["screened", "bf16", "nf4"]
"""How greedy tokens are found: `bf16` from all logits; `screened` the same tokens through a 4-bit copy of the
head that leaves a few for the full product; `nf4` from the 4-bit head alone, which costs quality."""

_DEVIATIONS = 6.0
"""Margin of the screen, in standard deviations of the 4-bit head's error. To lose the best token, the
difference of two errors would have to be 8.5 of its own standard deviations."""


_ROWS = 4096
"""Of the head, that are held in float32 at a time while their errors are taken."""


class Scores(Protocol):
    """The wanted rows of one step."""

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """[n, vocab] of these rows."""
        ...

    def best(self, rows: Sequence[int], noise: Noise | None = None) -> list[int]:
        """The most likely token of each of these rows, or the one that its noise makes the best; -1 where the
        logits are not finite."""
        ...

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        """[n, width] of these rows: what the LM head reads."""
        ...


class LogitScores:
    """Logits that have been computed already, [n, vocab], from hidden states [n, width]."""

    def __init__(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        self._logits = logits
        self._hidden = hidden

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        return self._hidden[list(rows)]

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        return self._logits if len(rows) == len(self._logits) else self._logits[list(rows)]

    def best(self, rows: Sequence[int], noise: Noise | None = None) -> list[int]:
        logits = self.logits(rows)
        values, tokens = (logits if noise is None else noise.over(logits.float())).max(-1)
        best: list[int] = torch.where(values.isfinite(), tokens, -1).tolist()
        return best


class Screen:
    """A 4-bit copy of a bfloat16 head, and how far each of its rows is off."""

    def __init__(self, head: Any) -> None:
        copy = nf4_copy(head)
        approximate = dequantize_4bit(copy.weight.data, copy.weight.quant_state)
        pairs = zip(head.weight.split(_ROWS), approximate.split(_ROWS), strict=True)
        errors = torch.cat([(exact.float() - rows.float()).norm(dim=1) for exact, rows in pairs])
        # The error of a logit is a sum of `in_features` products: its deviation is |x| |e| / sqrt(in_features).
        self._margins = (_DEVIATIONS / math.sqrt(head.in_features) * errors).numpy()
        self._weight = head.weight
        self._packed = PackedLinear([copy])

    @staticmethod
    def fits(head: Any) -> bool:
        """Whether the head can be screened on this machine."""
        return (
            type(head) is torch.nn.Linear and head.bias is None and fits_packed(head.in_features, head.out_features)
        )

    def best(self, hidden: torch.Tensor, noise: Noise | None = None) -> list[int]:
        """Best token for each row of hidden [n, width], bfloat16."""
        rows, width = hidden.shape
        approx = torch.empty(rows, len(self._margins), dtype=torch.bfloat16)
        self._packed(hidden.data_ptr(), approx.data_ptr(), rows)
        tokens = np.empty(rows, np.int64)
        noise = noise or Noise.of([0.0] * rows, [0] * rows)
        best_tokens(
            hidden.data_ptr(), approx.data_ptr(), self._weight.data_ptr(), self._margins, rows, width,
            noise.inverses, noise.seeds, tokens,
        )  # fmt: skip
        if UNSURE in tokens:
            settle_unsure(
                hidden.float().numpy(), self._weight.data_ptr(), len(self._margins), noise.inverses, noise.seeds,
                tokens,
            )  # fmt: skip
        best: list[int] = tokens.tolist()
        return best


class HiddenScores:
    """Hidden states [n, width] whose logits are computed only for those who need them."""

    def __init__(self, hidden: torch.Tensor, head: Any, screen: Screen | None, *, together: bool = False) -> None:
        """`together`: the head takes only all rows at once, because it has adapters for each of them."""
        self._hidden = hidden
        self._head = head
        self._together = together
        self._screen = screen
        self._computed: LogitScores | None = None

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        return self._hidden[list(rows)]

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        if self._computed is None and (self._together or len(rows) == len(self._hidden)):
            self._computed = LogitScores(self._head(self._hidden), self._hidden)
        if self._computed is not None:
            return self._computed.logits(rows)
        logits: torch.Tensor = self._head(self._hidden[list(rows)])
        return logits

    def best(self, rows: Sequence[int], noise: Noise | None = None) -> list[int]:
        if self._screen is None:
            return LogitScores(self.logits(rows), self._hidden).best(range(len(rows)), noise)
        hidden = self._hidden if len(rows) == len(self._hidden) else self._hidden[list(rows)]
        return self._screen.best(hidden, noise)


def nf4_copy(head: Any) -> Linear4bit:
    """The head in NF4; a tied embedding stays as it is."""
    copy = Linear4bit(
        head.in_features, head.out_features, bias=head.bias is not None, compute_dtype=head.weight.dtype,
        compress_statistics=False, quant_type="nf4", device="meta",
    )  # fmt: skip
    copy.weight = Params4bit(
        head.weight.detach().clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    copy.bias = head.bias
    copy = copy.to(head.weight.device).eval()
    copy.support_avx512bf16_for_cpu = packable(copy)  # as in `base.load`
    return copy
