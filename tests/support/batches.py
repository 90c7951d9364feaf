"""Random input for the kernels: batches over scattered pages, resident weights, tensors in bfloat16."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from onebase_adapters.base_shape import Site
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.instruction_set import ACTIVATIONS, Bottleneck, LowRank
from onebase_engine.kernels.arena import Arena
from onebase_engine.kernels.batch import BLOCK, Batch, Owners, Traits
from onebase_engine.kernels.bitsandbytes_import import Linear4bit, Params4bit
from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.tables import BottleneckTable, LowRankTable, Vectors
from onebase_engine.kernels.tiles import low_rank_tiles
from onebase_engine.runner import batching
from onebase_engine.runner.batching import Chunk

CPU = torch.device("cpu")


def random_bf16(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def make_owners(slots: Sequence[int], kernels: Kernels) -> Owners:
    """Rows of these slots."""
    array = np.array(slots, np.int32)
    return Owners(array, low_rank_tiles(array, kernels.TILE_ROWS))


def make_batch(
    runs: Sequence[tuple[int, int]],
    kernels: Kernels,
    kv_heads: int,
    pages: Sequence[Sequence[int]],
    device: torch.device = CPU,
) -> Batch:
    """A batch of `runs` (start, count) of sequences; `pages`: each one's cache blocks."""
    chunks = [Chunk([0] * count, start, blocks) for (start, count), blocks in zip(runs, pages, strict=True)]
    return batching.make_batch(chunks, kernels, Traits.none(1), device, vocab=1, kv_heads=kv_heads)


def deal_pages(lengths: Sequence[int], seed: int, total: int) -> list[list[int]]:
    """Blocks for sequences of these lengths, scattered over a cache of `total`."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[order.pop() for _ in range(-(-length // BLOCK))] for length in lengths]


def make_table(
    kernels: Kernels,
    in_features: int,
    outs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    seed: int = 0,
    device: torch.device = CPU,
) -> LowRankTable:
    """A table over sites of `outs` features: `ranks[slot - 1][site]`, 0 for an untouched site."""
    sites = [Site(f"site{index}", in_features, out) for index, out in enumerate(outs)]
    table = LowRankTable(sites, len(ranks) + 1, paired_columns=kernels.PAIRED_COLUMNS)
    for slot, each in enumerate(ranks, start=1):
        updates = {
            site.name: LowRank(
                site.name,
                random_bf16(seed + 100 * slot + index, rank, in_features, scale=in_features**-0.5),
                random_bf16(seed + 100 * slot + 50 + index, site.out_features, rank),
                scale=0.5 + slot / 4,
            )
            for index, (site, rank) in enumerate(zip(sites, each, strict=True))
            if rank
        }
        table.put(slot, updates, Arena(table.size(updates), device))
    return table


def make_bottlenecks(
    kernels: Kernels, width: int, ranks: Sequence[int], device: torch.device = CPU
) -> BottleneckTable:
    """A table of bottlenecks of these ranks by slot, 0 for none: each activation in turn, every second parallel."""
    table = BottleneckTable("block", len(ranks) + 1, device, transposed=kernels.TRANSPOSED_DOWN)
    for slot, rank in enumerate(ranks, start=1):
        if rank:
            part = Bottleneck(
                "block",
                random_bf16(slot, rank, width, scale=width**-0.5),
                random_bf16(slot + 20, rank).float(),
                random_bf16(slot + 40, width, rank, scale=rank**-0.5),
                random_bf16(slot + 60, width).float(),
                ACTIVATIONS[slot % len(ACTIVATIONS)],
                scale=0.5 + slot / 4,
                parallel=bool(slot % 2),
            )
            parts = Parts({}, {}, {}, {}, {"block": part})
            table.put(slot, parts, Arena(table.size(parts), device))
    return table


def make_vectors(width: int, slots: int, having: Sequence[int], device: torch.device = CPU) -> Vectors:
    """Random vectors for the slots in `having`."""
    vectors = Vectors(slots, device)
    for slot in having:
        vectors.put(slot, random_bf16(slot + width, width))
    return vectors


def make_linear4bit(
    seed: int, in_features: int, out_features: int, *, bias: bool = False, device: torch.device = CPU
) -> Linear4bit:
    """Random weights in NF4, their scales quantised, too; as bitsandbytes lays them out."""
    module = Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = random_bf16(seed, out_features, in_features).to(device)
    module.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    if bias:
        module.bias = nn.Parameter(random_bf16(seed + 1, out_features).to(device), requires_grad=False)
    module.to(device)
    module.support_avx512bf16_for_cpu = False
    return module
