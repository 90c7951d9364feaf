"""Memory for one adapter's matrices, on huge pages where the system has them."""

import mmap

import torch

_HUGE_PAGE = 2**21


_ALIGN = 64
"""Elements: matrices begin on cache lines (and on what a GPU loads at once)."""


_TAIL = 64
"""Elements that a kernel may read past a matrix' end."""


class Arena:
    """One adapter's weights in the order in which a step reads them. On a CPU on huge pages where the system has
    them: a batch of many adapters is bound by how fast their weights stream from memory."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.bytes = max(2 * elements, mmap.PAGESIZE)
        self._used = 0
        if device.type != "cpu":
            self._memory = torch.empty(self.bytes // 2, dtype=torch.bfloat16, device=device)
            return
        # Rounded up so that the last page can be a huge one too.
        pages = mmap.mmap(-1, -(-self.bytes // _HUGE_PAGE) * _HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(pages, dtype=torch.bfloat16)

    @staticmethod
    def size(elements: int) -> int:
        """The room that a matrix of so many elements takes."""
        return -(-(elements + _TAIL) // _ALIGN) * _ALIGN

    def hold(self, matrix: torch.Tensor) -> torch.Tensor:
        """Keep a matrix in bfloat16, contiguous, followed by the tail that a kernel may read past its end."""
        target = self._memory[self._used : self._used + matrix.numel()].view(matrix.shape)
        target.copy_(matrix)
        self._used += self.size(matrix.numel())
        return target
