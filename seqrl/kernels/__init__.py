"""What a training step and decoding do between their matrix products, as close to the processor as C goes.

Each operation has its gradient where training needs it, and torch's own operations for devices, types and
sizes that the C does not have. `build.py` compiles the C on first use.
"""

from seqrl.kernels.attention import Cache, Spans, Turn, attend, attend_cached, self_attention, turned
from seqrl.kernels.build import library
from seqrl.kernels.call import fits
from seqrl.kernels.experts import (
    PackedExperts,
    combined,
    combined_backward,
    expert_products_backward,
)
from seqrl.kernels.head import draw
from seqrl.kernels.layers import add_norm, gated, gated_backward
from seqrl.kernels.products import filled_up, linear, packable, product
from seqrl.kernels.record import Record, current, made
from seqrl.kernels.transfer import Arriving, pinned, sent

__all__ = [
    "Arriving",
    "Cache",
    "PackedExperts",
    "Record",
    "Spans",
    "Turn",
    "add_norm",
    "attend",
    "attend_cached",
    "combined",
    "combined_backward",
    "current",
    "draw",
    "expert_products_backward",
    "filled_up",
    "fits",
    "gated",
    "gated_backward",
    "library",
    "linear",
    "made",
    "packable",
    "pinned",
    "product",
    "self_attention",
    "sent",
    "turned",
]
