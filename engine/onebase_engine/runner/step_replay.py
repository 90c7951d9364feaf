"""Decoding steps captured as CUDA graphs, by their size, and replayed.

A decoding step is some thousand kernels of a few microseconds, and launching one costs the host more than that. A
captured step is launched at once. It reads what it is about (tokens, places, pages, whose rows) from arrays that
stay where they are, and finds adapters through addresses that do, so that it serves any mix of adapters; a step of
fewer sequences is filled up with rows that write into a page that nobody reads.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from onebase_engine.base.mixture import Mixture
from onebase_engine.kernels.batch import BLOCK, Batch, DeviceArrays, Owners, Traits
from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.tables import LowRankTable
from onebase_engine.kernels.tiles import low_rank_tiles
from onebase_engine.runner.batching import Chunk

log = logging.getLogger(__name__)

Scores = tuple[torch.Tensor, torch.Tensor]
"""Logits [rows, vocab], and the hidden states [rows, width] that they are made of."""
Capture = Callable[[Callable[[], Scores]], Callable[[], Scores]]
"""From a computation to what runs it again, on what its arrays hold then."""

_ROWS = (1, 2, 4, 8, *range(16, 257, 16))
"""Sequences of captured steps."""
_TILES = (0, 1, 4, 16, 64, 256)
"""Tiles of low-rank updates in captured steps."""
_BLOCKS = tuple(16 * 4**n for n in range(8))
"""Cache blocks of the longest sequence in captured steps."""
_STEADY = {"default", "linear", "llama3", "yarn"}
"""transformers' rotary embeddings that depend on the position alone; others wait for the largest of a batch."""


class Replays:
    """Decoding steps of one model. Not thread-safe: one step at a time."""

    def __init__(
        self,
        run: Callable[[Batch], Scores],
        tables: Sequence[LowRankTable],
        kernels: Kernels,
        device: torch.device,
        *,
        spare_block: int,
        capture: Capture | None = None,
    ) -> None:
        """`run`: the model over a batch without waiting for a number of it; `spare_block`: a cache block that is
        nobody's; `capture` is CUDA's."""
        self._run = run
        self._tables = tables
        self._kernels = kernels
        self._device = device
        self._spare = spare_block
        self._capture = capture or CudaCapture()
        self._steps: dict[tuple[int, int, int], _Step] = {}
        self._widths: list[int] = []
        self._changes = -1
        self._off = False

    @staticmethod
    def suit(model: Any) -> bool:
        """Whether the model's forward pass can do without a number of what it computes."""
        if any(isinstance(module, Mixture) for module in model.modules()):
            return False
        kinds = (getattr(module, "rope_type", "default") for module in model.modules())
        flat = (kind for each in kinds for kind in (each.values() if isinstance(each, dict) else [each]))
        return {*flat} <= _STEADY

    def fit(self, chunks: Sequence[Chunk], traits: Traits, vocab: int) -> bool:
        """Whether the chunks are a decoding step that can be captured: a token each, low-rank updates alone."""
        return (
            not self._off
            and len(chunks) <= _ROWS[-1]
            and all(len(chunk.tokens) == chunk.wanted == 1 and chunk.tokens[0] < vocab for chunk in chunks)
            and not any(traits.affine[chunk.slot] or traits.bottleneck[chunk.slot] for chunk in chunks)
        )

    def __call__(self, chunks: Sequence[Chunk], changes: int) -> Scores | None:
        """Logits and hidden states of the chunks, valid until the next call; `changes`: how often adapters came or
        left. None where the step cannot be captured after all, for good."""
        if changes != self._changes:
            self._changes = changes
            widths = [table.widest for table in self._tables]
            if widths != self._widths:
                self._widths = widths
                self._steps.clear()
        for table in self._tables:
            if table.widest:
                table.rows_on(self._device)
        tiles = low_rank_tiles(np.array([chunk.slot for chunk in chunks], np.int32), self._kernels.TILE_ROWS)
        blocks = max(len(chunk.blocks) for chunk in chunks)
        size = (_at_least(_ROWS, len(chunks)), _at_least(_TILES, len(tiles)), _at_least(_BLOCKS, blocks))
        step = self._steps.get(size)
        if step is None:
            step = _Step(*size, self._kernels.TILE_ROWS, self._device, self._spare)
            step.fill(chunks, tiles)
            try:
                step.replay = self._capture(lambda: self._run(step.batch))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                log.warning("decoding steps cannot be captured, and run kernel by kernel", exc_info=True)
                self._off = True
                return None
            self._steps[size] = step
        else:
            step.fill(chunks, tiles)
        logits, hidden = step.replay()
        return logits[: len(chunks)], hidden[: len(chunks)]


def _at_least(sizes: Sequence[int], wanted: int) -> int:
    return sizes[bisect_left(sizes, wanted)]


class _Step:
    """A captured step's arrays: one on the host, and its copy on the device."""

    def __init__(self, rows: int, tiles: int, blocks: int, tile: int, device: torch.device, spare: int) -> None:
        shapes = {
            "tokens": (rows,), "positions": (rows,), "cache_slots": (rows,), "tables": (rows, blocks),
            "tiles": (tiles, 1 + tile),
        }  # fmt: skip
        # To 16 bytes each: kernels are compiled anew for pointers of another alignment.
        starts = np.cumsum([0, *(-(-int(np.prod(shape)) // 4) * 4 for shape in shapes.values())]).tolist()
        pinned = device.type == "cuda"
        self._host = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=pinned)
        self._there = self._host.to(device)
        self._spare = spare
        parts = {
            name: slice(start, start + int(np.prod(shape)))
            for (name, shape), start in zip(shapes.items(), starts, strict=False)
        }
        self._arrays = {name: self._host.numpy()[part].reshape(shapes[name]) for name, part in parts.items()}
        there = {name: self._there[part].view(shapes[name]) for name, part in parts.items()}
        each = np.arange(rows, dtype=np.int32)
        items = torch.from_numpy(np.stack([each, each, np.ones_like(each)], axis=1)).to(device)
        nobody = np.zeros(rows, np.int32)
        owners = Owners(nobody, self._arrays["tiles"])
        owners.hold(there["tiles"])
        nothing = np.empty(0, np.int64)
        self.batch = Batch(
            token_ids=there["tokens"],
            positions=self._arrays["positions"],
            visible=self._arrays["positions"],
            owners=owners,
            head_owners=owners,
            query_start=np.arange(rows + 1),
            tables=self._arrays["tables"],
            cache_slots=self._arrays["cache_slots"],
            sample_rows=torch.arange(rows, device=device),
            virtual_rows=nothing,
            virtual_indices=nothing,
            items=nothing,
            held=DeviceArrays(
                there["positions"], there["positions"], there["cache_slots"], there["tables"], items, 1
            ),
        )
        self.replay: Callable[[], Scores]

    def fill(self, chunks: Sequence[Chunk], tiles: np.ndarray) -> None:
        """Let the next replay be of these chunks, whose low-rank tiles are `tiles`."""
        arrays, count = self._arrays, len(chunks)
        tokens, positions, tables = arrays["tokens"], arrays["positions"], arrays["tables"]
        tokens[:count] = [chunk.tokens[0] for chunk in chunks]
        tokens[count:] = 0
        positions[:count] = [chunk.start for chunk in chunks]
        positions[count:] = 0
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.blocks)] = chunk.blocks
        tables[count:, 0] = self._spare
        within = positions // BLOCK
        arrays["cache_slots"][:] = tables[np.arange(len(tables)), within] * BLOCK + positions % BLOCK
        arrays["tiles"][:, 0] = 0  # whose are none
        arrays["tiles"][:, 1:] = -1
        arrays["tiles"][: len(tiles)] = tiles
        self._there.copy_(self._host)


class CudaCapture:
    """Captures on the current device; all graphs share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._last: Any = None
        """Kept, because a pool ends with its last graph."""

    def __call__(self, run: Callable[[], Scores]) -> Callable[[], Scores]:
        # Once beforehand: kernels are compiled, and libraries take what they keep.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._last is None else self._last.pool()
        # Another thread, which reads adapters, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            scores = run()
        self._last = graph

        def replay() -> Scores:
            graph.replay()
            return scores

        return replay
