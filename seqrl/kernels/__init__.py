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
from seqrl.kernels.flash import FLASH_PAGE, attend_flat, attend_pages, has_pages, is_flash
from seqrl.kernels.head import draw
from seqrl.kernels.layers import add_norm, gated, gated_backward
from seqrl.kernels.products import filled_up, linear, packable, product
from seqrl.kernels.record import Record, current, made
from seqrl.kernels.transfer import Arriving, fill, sent

__all__ = [
    "FLASH_PAGE",
    "Arriving",
    "Cache",
    "PackedExperts",
    "Record",
    "Spans",
    "Turn",
    "add_norm",
    "attend",
    "attend_cached",
    "attend_flat",
    "attend_pages",
    "combined",
    "combined_backward",
    "current",
    "draw",
    "expert_products_backward",
    "fill",
    "filled_up",
    "fits",
    "gated",
    "gated_backward",
    "has_pages",
    "is_flash",
    "library",
    "linear",
    "made",
    "packable",
    "product",
    "self_attention",
    "sent",
    "turned",
]
