"""Drawing tokens as finding the best: the largest of logits / temperature + Gumbel noise is a draw from their
softmax (Gumbel 1954; Maddison et al. 2014, "A* Sampling", section 2). The noise is a function of (seed, token), so
whoever screens tokens first, or scores only some, draws the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onebase_engine.kernels.cpu.noise import add_gumbel, add_gumbel_of

LEAST_TEMPERATURE = 1e-5
"""Below that, dividing overflows, and the best has all the probability long before."""


@dataclass(frozen=True)
class Noise:
    """Seeds and temperatures to draw with, for each of n rows."""

    inverses: np.ndarray
    """[n] float32: 1 / temperature; 0 takes the best without noise."""
    seeds: np.ndarray
    """[n] uint64."""

    @classmethod
    def of(cls, temperatures: Sequence[float], seeds: Sequence[int]) -> "Noise":
        """For each row a temperature, 0 for none, and a seed of 64 bits."""
        inverses = [1 / max(t, LEAST_TEMPERATURE) if t > 0 else 0.0 for t in temperatures]
        return cls(np.array(inverses, np.float32), np.array(seeds, np.uint64))

    def over(self, logits: torch.Tensor) -> torch.Tensor:
        """logits / temperature + noise for logits [n, vocab] float32; rows without noise as they are."""
        rows = np.flatnonzero(self.inverses)
        if not len(rows):
            return logits
        places = torch.as_tensor(rows, device=logits.device)
        scales = np.where(self.inverses == 0, np.float32(1), self.inverses)
        scaled = logits * torch.as_tensor(scales, device=logits.device)[:, None]
        if logits.device.type == "cpu":
            for row in rows:
                add_gumbel(scaled[row].numpy(), self.seeds[row])
        else:
            tokens = torch.arange(logits.shape[1], device=logits.device)[None]
            scaled[places] += gumbel(self.seeds[rows], tokens)
        return scaled

    def best_of(self, logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Which of some `tokens` [n, k] int64 is drawn, by their logprobs [n, k] up to a constant; [n] places."""
        if logprobs.device.type != "cpu":
            return (logprobs + gumbel(self.seeds, tokens)).argmax(-1)
        noisy = logprobs.clone()
        for row, seed in enumerate(self.seeds):
            add_gumbel_of(noisy[row].numpy(), tokens[row].numpy(), seed)
        return noisy.argmax(-1)


def gumbel(seeds: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
    """Noise of the seeds [n] for the tokens [n or 1, k] int64, float32: the definition of `add_gumbel`."""
    low = torch.as_tensor((seeds & np.uint64(0xFFFFFFFF)).astype(np.int64), device=tokens.device)[:, None]
    high = torch.as_tensor((seeds >> np.uint64(32)).astype(np.int64), device=tokens.device)[:, None]
    mixed = _mix(_mix(tokens ^ low) ^ high)
    u = (mixed.float() + 0.5) * 2.0**-32
    small = u * (1 + u * (0.5 + u / 3))
    return -torch.where(u < 0.004, small, -(1 - u).clamp(min=2.0**-24).log()).log()


def _mix(h: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)
