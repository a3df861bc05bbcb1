"""Products in bfloat16 on the processor's matrix unit (AMX), where it has one: tiles.c.

Matrices are read where they lie, in float32 or bfloat16, and laid out as the unit wants them; gradients come
in their own type. No sum depends on the number of rows.

Shape legend: T rows, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqrl.kernels.call import LANES, call, has_tiles

_STEP = 32
"""Numbers that the unit adds up at once."""


class Tiles(NamedTuple):
    """Matrices for the unit: `sources` [out_i, in] joined to one [out, in], or one of [E, out, in]."""

    sources: tuple[Tensor, ...]
    columns: Tensor | None = None
    """As products with the transpose want them, [E, out / 16, in / 32, 16, 16, 2] bfloat16; None: laid out at
    each product, so that no copy of the weights stays."""

    @staticmethod
    def fit(*sources: Tensor, dtype: torch.dtype) -> bool:
        return all(
            has_tiles(dtype, x.device) and x.dtype in (torch.float32, torch.bfloat16) for x in sources
        ) and all(len(x) % LANES == 0 for x in sources[:-1])

    @property
    def outs(self) -> int:
        return sum(x.shape[-2] for x in self.sources)

    @property
    def ins(self) -> int:
        return self.sources[0].shape[-1]

    def laid_out(self) -> Tiles:
        """For many products without gradient."""
        return self._replace(columns=self._columns())

    def product(
        self, x: Tensor, bias: Tensor | None = None, token: Tensor | None = None, ends: Tensor | None = None
    ) -> Tensor:
        """`x` [T, in] times the transposed matrix, plus `bias` [out]: [T, out].

        Of experts, row r is that of `x[token[r]]` (x[r] where that is None), and expert e has the rows up to
        `ends[e]`, [E] int64, from where the expert before it ends.
        """
        columns = self._columns() if self.columns is None else self.columns
        return _product(x, columns, self.outs, bias, token, ends)

    def backward(self, grad: Tensor, ends: Tensor | None = None) -> Tensor:
        """The gradient [T, in] of `product`'s rows, given `grad` [T, out]."""
        first = self.sources[0]
        shape = (-(-self.ins // LANES), -(-self.outs // _STEP))
        transposed = first.new_empty(*first.shape[:-2], *shape, LANES, LANES, 2, dtype=torch.bfloat16)
        self._lay_out(None, transposed)
        return _product(grad, transposed, self.ins, None, None, ends)

    def gradients(
        self, grad: Tensor, x: Tensor, token: Tensor | None = None, ends: Tensor | None = None
    ) -> list[Tensor]:
        """Of each source, in its type and shape, given `grad` [T, out] and what `product` was given."""
        grad, made, first = grad.contiguous(), [], 0
        for source in self.sources:
            made.append(torch.empty_like(source, memory_format=torch.contiguous_format))
            _add_gradient(grad, first, x, token, ends, made[-1], add=False)
            first += source.shape[-2]
        return made

    def _columns(self) -> Tensor:
        first = self.sources[0]
        shape = (-(-self.outs // LANES), -(-self.ins // _STEP))
        columns = first.new_empty(*first.shape[:-2], *shape, LANES, LANES, 2, dtype=torch.bfloat16)
        self._lay_out(columns, None)
        return columns

    def _lay_out(self, columns: Tensor | None, transposed: Tensor | None) -> None:
        first = 0
        for source in self.sources:
            sizes = (source.shape[0] if source.ndim == 3 else 1, *source.shape[-2:])
            is_f32 = source.dtype == torch.float32
            call("tile_pack", *sizes, source.contiguous(), is_f32, first, self.outs, columns, transposed)
            first += source.shape[-2]


def add_gradient(grad: Tensor, x: Tensor, into: Tensor) -> None:
    """into [out, in] float32 += the transposed `grad` [T, out] times `x` [T, in], both bfloat16."""
    _add_gradient(grad.contiguous(), 0, x, None, None, into, add=True)


def _product(
    x: Tensor, columns: Tensor, outs: int, bias: Tensor | None, token: Tensor | None, ends: Tensor | None
) -> Tensor:
    rows, ins, experts = len(x if token is None else token), x.shape[1], 1 if ends is None else len(ends)
    y = x.new_empty(rows, outs)
    bias = None if bias is None else bias.float()
    call("tile_products", experts, rows, ins, outs, x.contiguous(), token, columns, ends, bias, y)
    return y


def _add_gradient(
    grad: Tensor, first: int, x: Tensor, token: Tensor | None, ends: Tensor | None, into: Tensor, *, add: bool
) -> None:
    experts, outs, ins = into.shape if into.ndim == 3 else (1, *into.shape)
    of_grad = grad.data_ptr() + first * grad.element_size(), grad.shape[1]
    is_f32 = into.dtype == torch.float32
    call(
        "tile_gradient",
        *(experts, len(grad), ins, outs, *of_grad, x.contiguous(), token, ends, is_f32, add, into),
    )
