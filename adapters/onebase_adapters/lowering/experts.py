"""LoRA on a mixture's experts, in both forms in which PEFT stores it, as one update of each expert's own site.

Of a stacked parameter (PEFT's `target_parameters`), A holds the experts' rows one expert after another and B their
columns rank by rank. Adapters from before transformers 5 have modules for each expert, of which two, the gate's and
the up projection's, became one parameter: their updates are put side by side, as PEFT does when it reads them.
"""

import re
from collections.abc import Iterator, Mapping

import torch

from onebase_adapters.base_shape import Site
from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.lora_scale import scale_of
from onebase_adapters.lowering.source import Source
from onebase_adapters.primitives.instruction_set import LowRank

_SITE = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>gate_up_proj|down_proj)$")
_STACKED = re.compile(r"^(?P<module>.+\.experts(?:\.base_layer)*)\.lora_(?P<part>[AB])\.weight$")
_APART = re.compile(r"^(?P<module>.+\.experts\.\d+\.(?:gate_proj|up_proj|w1|w2|w3))\.(?P<rest>.+)$")
_HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
"""Which half of `gate_up_proj` an older module has become; Mixtral's `w2` is `down_proj`."""

Pair = dict[str, torch.Tensor]
"""A and B, float32."""


def split_experts(source: Source) -> tuple[list[LowRank], Source]:
    """The updates of experts, and what is left. Raises AdapterFormatError or AdapterMismatchError."""
    sites = _sites(source)
    if not sites:
        return [], source
    stacked: dict[str, Pair] = {}
    apart: dict[str, Pair] = {}
    taken: set[str] = set()
    for name, tensor in source.tensors.items():
        if (match := _STACKED.match(name)) is not None:
            stacked.setdefault(match["module"], {})[match["part"]] = tensor.float()
        elif (match := _APART.match(name)) is not None:
            if match["rest"] not in ("lora_A.weight", "lora_B.weight"):
                raise AdapterFormatError(
                    f"Tensor {name!r}: of a mixture's experts, LoRA's A and B are served, and nothing else.",
                    field="path",
                )
            apart.setdefault(match["module"], {})[match["rest"][5]] = tensor.float()
        else:
            continue
        taken.add(name)
    updates = [*_of_stacks(source, sites, stacked), *_of_modules(source, sites, apart)]
    names = [update.site for update in updates]
    if twice := sorted({name for name in names if names.count(name) > 1}) if len({*names}) < len(names) else []:
        raise AdapterFormatError(f"The adapter has two updates of {twice[0]!r}.", field="path")
    return updates, source.without(taken)


def _sites(source: Source) -> dict[str, dict[str, list[Site]]]:
    """By the experts' module and by matrix, each expert's site."""
    found: dict[str, dict[str, list[Site]]] = {}
    for name, site in source.base.sites.items():  # in the model's order
        if (match := _SITE.match(name)) is not None:
            found.setdefault(match["experts"], {}).setdefault(match["matrix"], []).append(site)
    return found


def _whole(module: str, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    if pair.keys() != {"A", "B"}:
        raise AdapterFormatError(f"{module!r} has no lora_{'B' if 'A' in pair else 'A'}.", field="path")
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterFormatError(
            f"{module!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not share a rank.", field="path"
        )
    return a, b


def _of_stacks(
    source: Source, sites: Mapping[str, Mapping[str, list[Site]]], stacked: Mapping[str, Pair]
) -> Iterator[LowRank]:
    """PEFT nests the two parameters' wrappers and names neither: their sizes tell which is which."""
    for module, pair in stacked.items():
        a, b = _whole(module, pair)
        experts = module.partition(".base_layer")[0]
        if experts not in sites:
            raise AdapterMismatchError(f"Base {source.base.name} has no experts {experts!r}.", field="path")
        sizes = (a.shape[1], b.shape[0])
        fitting = {
            matrix: each
            for matrix, each in sites[experts].items()
            if sizes == (each[0].in_features, each[0].out_features)
        }
        if len(fitting) != 1:
            wanted = " or ".join(
                f"{each[0].in_features} -> {each[0].out_features}" for each in sites[experts].values()
            )
            raise AdapterMismatchError(
                f"{module!r}: the adapter maps {sizes[0]} -> {sizes[1]}, this base's experts {wanted}.",
                field="path",
            )
        matrix, each = next(iter(fitting.items()))
        if len(a) % len(each):
            raise AdapterMismatchError(
                f"{module!r}: {len(a)} rows of lora_A are no ranks of {len(each)} experts, which this base has.",
                field="path",
            )
        rank = len(a) // len(each)
        scale = scale_of(source.config, f"{experts}.{matrix}", rank)
        for site, mine, yours in zip(
            each, a.view(len(each), rank, -1), b.view(len(b), rank, -1).unbind(-1), strict=True
        ):
            yield LowRank(site.name, mine, yours, scale)


def _of_modules(
    source: Source, sites: Mapping[str, Mapping[str, list[Site]]], apart: Mapping[str, Pair]
) -> Iterator[LowRank]:
    """Modules of single experts, as transformers 4 had them."""
    halves: dict[str, dict[int, LowRank]] = {}
    for module, pair in sorted(apart.items()):
        a, b = _whole(module, pair)
        expert, _, old = module.rpartition(".")
        site = source.base.sites.get(f"{expert}.{'gate_up_proj' if old in _HALVES else 'down_proj'}")
        if site is None:
            raise AdapterMismatchError(f"Base {source.base.name} has no expert {expert!r}.", field="path")
        out = site.out_features // 2 if old in _HALVES else site.out_features
        if (a.shape[1], b.shape[0]) != (site.in_features, out):
            raise AdapterMismatchError(
                f"{module!r}: the adapter maps {a.shape[1]} -> {b.shape[0]}, this base's expert "
                f"{site.in_features} -> {out}.",
                field="path",
            )
        update = LowRank(site.name, a, b, scale_of(source.config, module, len(a)))
        if old in _HALVES:
            halves.setdefault(site.name, {})[_HALVES[old]] = update
        else:
            yield update
    for name, found in halves.items():
        yield _joined(name, found, source.base.sites[name].out_features // 2)


def _joined(name: str, halves: Mapping[int, LowRank], out: int) -> LowRank:
    """Updates of the two halves of a site's outputs as one, of the sum of their ranks."""
    scale = next(iter(halves.values())).scale
    places = sorted(halves)
    a = torch.cat([halves[place].a for place in places])
    b = torch.zeros(2 * out, len(a))
    first = 0
    for place in places:
        update = halves[place]
        b[place * out : (place + 1) * out, first : first + update.rank] = update.b * (update.scale / scale)
        first += update.rank
    return LowRank(name, a, b, scale)
