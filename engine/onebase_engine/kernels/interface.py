"""The kernels' contract: all that a device has for a served model.

`reference` is the definition in plain torch and runs anywhere; `cpu` is numba, `cuda` is triton. Each is a module
with the names of `Kernels`, and `choose` takes one, so that nothing above this package names a device's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from onebase_adapters.base_shape import BaseShape
from onebase_engine.kernels.adapter_interface import AdapterKernels, KeyValuePages
from onebase_engine.kernels.batch import Batch
from onebase_engine.kernels.gumbel_noise import Noise
from onebase_engine.kernels.site_tables import SiteTables
from onebase_engine.kernels.tables import BottleneckTable

Fused = Callable[[Batch, torch.Tensor], torch.Tensor]
"""From a batch and its embeddings [T, hidden], which are used up, to the last hidden states [n, hidden] of its
sample rows, ready for the LM head."""


Grouped = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Rows [n, in], sorted by which of several linear modules is theirs, to [n, out]; module m has the rows from
`bounds[m]` to `bounds[m + 1]`."""


class HeadScreen(Protocol):
    """Finds best tokens without all logits."""

    def best(self, hidden: torch.Tensor, noise: Noise | None = None) -> list[int]:
        """For each row of hidden [n, width] the token of the highest logit, or of the highest sum of logit and
        noise: the very one that all logits would give."""
        ...


class Kernels(AdapterKernels, Protocol):
    """All that a device has for a served model."""

    @property
    def CAPTURED(self) -> bool:  # noqa: N802
        """Whether a decoding step's launches can be captured once and replayed."""
        ...

    def fuse(
        self, model: Any, shape: BaseShape, cache: KeyValuePages, slots: int
    ) -> tuple[Fused, list[SiteTables], list[BottleneckTable]] | None:
        """The forward pass of transformers' `model` on kernels of its own, with the tables of its layers' sites and
        sublayers. None where the model keeps its own layers; the log says why."""
        ...

    def group(self, modules: Sequence[Any]) -> Grouped:
        """The product of linear modules of one size, without biases, of which each row takes its own."""
        ...

    def screen(self, head: Any) -> HeadScreen | None:
        """For an LM head; None where it takes all logits."""
        ...


class Build(Protocol):
    """Kernels that are being compiled."""

    def wait(self) -> None:
        """Until all is compiled that any base needs; the rest goes on."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing is being compiled any more."""
        ...
