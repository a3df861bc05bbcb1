"""Both sides of the gate of a feed-forward layer, dense or of experts: the products with the gate, where the
processor can do the two at once.

Shape legend: T rows, H hidden, I intermediate. `token` and `ends` say whose rows are whose, of experts, as in
`expert_products`.
"""

from __future__ import annotations

from torch import Tensor

from seqrl.kernels.call import LANES
from seqrl.kernels.experts import Matrices, PackedExperts, expert_backward_x, expert_products
from seqrl.kernels.layers import gated, gated_backward
from seqrl.kernels.products import Matrix, Reordered, product, product_backward
from seqrl.kernels.tiles import Tiles


def gated_product(
    x: Tensor,
    gate_up: Matrix | Matrices,
    token: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    keep: bool,
) -> tuple[Tensor | None, Tensor]:
    """`x` [.., H] times the transpose of `gate_up` [2 I, H]: [T, 2 I], which may be None unless `keep`; and
    silu(gate) * up of it, [T, I]. Without gradient."""
    if isinstance(gate_up, Tiles) and gate_up.outs % (2 * LANES) == 0:
        return gate_up.gated_product(x, token, ends, keep=keep)
    if ends is None:
        assert not isinstance(gate_up, PackedExperts)
        inner = product(x, gate_up)
    else:
        assert not isinstance(gate_up, Reordered)
        inner = expert_products(x, token, gate_up, ends)
    return inner, gated(inner)


def gated_product_backward(
    grad: Tensor, down: Tensor | Tiles, inner: Tensor, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Through `down` [H, I] and the gate before it: the gradient of `inner` [T, 2 I], given `grad` [T, H];
    and silu(gate) * up of `inner` [T, I], made again. I is a multiple of 16."""
    if isinstance(down, Tiles):
        return down.gated_backward(grad, inner, ends)
    of_activation = product_backward(grad, down) if ends is None else expert_backward_x(grad, down, ends)
    return gated_backward(inner, of_activation), gated(inner)
