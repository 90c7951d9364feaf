"""From a step's last hidden states to tokens: all logits for those who need them, just the best for the others."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch

from onebase_engine.kernels.gumbel_noise import Noise
from onebase_engine.kernels.interface import HeadScreen

log = logging.getLogger(__name__)

HeadKind = Literal["screened", "bf16", "nf4"]
"""How greedy tokens are found: `bf16` from all logits; `screened` the same tokens through a 4-bit copy of the
head that leaves a few for the full product; `nf4` from the 4-bit head alone, which costs quality."""


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


class HiddenScores:
    """Hidden states [n, width] whose logits are computed only for those who need them."""

    def __init__(
        self, hidden: torch.Tensor, head: Any, screen: HeadScreen | None, *, together: bool = False
    ) -> None:
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
