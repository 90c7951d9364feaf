"""BEFT (arXiv 2509.15974): nothing but a bias is trained, by default that of the value projections."""

from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import Shift

_END = ".beft_bias"


def lower(source: Source) -> Lowered:
    """`SITE.beft_bias` [1, out] is added to the site's output."""
    sites = sorted(name.removesuffix(_END) for name in source.tensors if name.endswith(_END))
    source.refuse_others({site + _END for site in sites})
    return Lowered(
        tuple(
            Shift(site, source.take(site + _END, (1, source.site(site).out_features)).flatten()) for site in sites
        )
    )
