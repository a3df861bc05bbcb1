"""What a training step and decoding do between their matrix products, as close to the processor as C goes.

`ops.py` has the operations, each with its gradient and with torch's own operations as the fallback;
`build.py` compiles the C on first use.
"""

from seqrl.kernels.build import library
from seqrl.kernels.ops import (
    Cache,
    PackedExperts,
    Spans,
    Turn,
    add_norm,
    attend,
    attend_cached,
    combined,
    combined_backward,
    draw,
    expert_products,
    expert_products_backward,
    fits,
    gated,
    gated_backward,
    linear,
    packable,
    product,
    recurring,
    self_attention,
    turned,
)

__all__ = [
    "Cache",
    "PackedExperts",
    "Spans",
    "Turn",
    "add_norm",
    "attend",
    "attend_cached",
    "combined",
    "combined_backward",
    "draw",
    "expert_products",
    "expert_products_backward",
    "fits",
    "gated",
    "gated_backward",
    "library",
    "linear",
    "packable",
    "product",
    "recurring",
    "self_attention",
    "turned",
]
