"""What a training step and decoding do between their matrix products, as close to the processor as C goes.

Each operation has its gradient where training needs it, and torch's own operations for devices, types and
sizes that the C does not have. `build.py` compiles the C on first use.
"""

from seqrl.kernels.attention import Cache, Spans, Turn, attend, attend_cached, self_attention, turned
from seqrl.kernels.build import library
from seqrl.kernels.call import fits, has_tiles
from seqrl.kernels.experts import (
    Matrices,
    PackedExperts,
    combined,
    combined_backward,
    expert_matrices,
    expert_products,
    expert_products_backward,
    laid_out_experts,
    pairs_by_expert,
)
from seqrl.kernels.flash import FLASH_PAGE, attend_flat, attend_pages, has_pages, is_flash
from seqrl.kernels.head import draw
from seqrl.kernels.layers import add_norm, gated, gated_backward
from seqrl.kernels.products import (
    Matrix,
    Reordered,
    Strips,
    add_weight_gradient,
    filled_up,
    laid_out,
    linear,
    matrix,
    product,
    product_backward,
)
from seqrl.kernels.record import Record, current, made
from seqrl.kernels.tiles import Tiles
from seqrl.kernels.transfer import Arriving, fill, sent

__all__ = [
    "FLASH_PAGE",
    "Arriving",
    "Cache",
    "Matrices",
    "Matrix",
    "PackedExperts",
    "Record",
    "Reordered",
    "Spans",
    "Strips",
    "Tiles",
    "Turn",
    "add_norm",
    "add_weight_gradient",
    "attend",
    "attend_cached",
    "attend_flat",
    "attend_pages",
    "combined",
    "combined_backward",
    "current",
    "draw",
    "expert_matrices",
    "expert_products",
    "expert_products_backward",
    "fill",
    "filled_up",
    "fits",
    "gated",
    "gated_backward",
    "has_pages",
    "has_tiles",
    "is_flash",
    "laid_out",
    "laid_out_experts",
    "library",
    "linear",
    "made",
    "matrix",
    "pairs_by_expert",
    "product",
    "product_backward",
    "self_attention",
    "sent",
    "turned",
]
