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
        return _product(grad, self._transposed(), self.ins, None, None, ends)

    def gradients(
        self, grad: Tensor, x: Tensor, token: Tensor | None = None, ends: Tensor | None = None
    ) -> list[Tensor]:
        """Of each source, in its type and shape, given `grad` [T, out] and what `product` was given."""
        made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in self.sources]
        _gradient(grad, x, token, ends, made, add=False)
        return made

    def _columns(self) -> Tensor:
        first = self.sources[0]
        shape = (-(-self.outs // LANES), -(-self.ins // _STEP))
        columns = first.new_empty(*first.shape[:-2], *shape, LANES, LANES, 2, dtype=torch.bfloat16)
        self._lay_out(columns, None)
        return columns

    def _transposed(self) -> Tensor:
        first = self.sources[0]
        shape = (-(-self.ins // LANES), -(-self.outs // _STEP))
        transposed = first.new_empty(*first.shape[:-2], *shape, LANES, LANES, 2, dtype=torch.bfloat16)
        self._lay_out(None, transposed)
        return transposed

    def _lay_out(self, columns: Tensor | None, transposed: Tensor | None) -> None:
        first = 0
        for source in self.sources:
            sizes = (source.shape[0] if source.ndim == 3 else 1, *source.shape[-2:])
            is_f32 = source.dtype == torch.float32
            call("tile_pack", *sizes, source.contiguous(), is_f32, first, self.outs, columns, transposed)
            first += source.shape[-2]


def add_gradient(grad: Tensor, x: Tensor, into: Tensor) -> None:
    """into [out, in] float32 += the transposed `grad` [T, out] times `x` [T, in], both bfloat16."""
    _gradient(grad, x, None, None, [into], add=True)


def _product(
    x: Tensor, columns: Tensor, outs: int, bias: Tensor | None, token: Tensor | None, ends: Tensor | None
) -> Tensor:
    rows, ins = (x if token is None else token).shape[0], x.shape[1]
    y = x.new_empty(rows, outs)
    bias = None if bias is None else bias.float()
    sizes = _count(ends), rows, ins, outs
    call("tile_products", *sizes, x.contiguous(), token, columns, ends, bias, y)
    return y


def _count(ends: Tensor | None) -> int:
    """Matrices whose rows end there."""
    return 1 if ends is None else len(ends)


def _gradient(
    grad: Tensor, x: Tensor, token: Tensor | None, ends: Tensor | None, into: list[Tensor], *, add: bool
) -> None:
    """Of matrices that are joined along `out`, each into its own."""
    assert all(each.is_contiguous() and each.dtype == into[0].dtype for each in into)
    outs = torch.tensor([each.shape[-2] for each in into])
    addresses = torch.tensor([each.data_ptr() for each in into])
    call(
        "tile_gradient",
        *(into[0].shape[0] if into[0].ndim == 3 else 1, len(grad), x.shape[1], grad.shape[1]),
        *(grad.contiguous(), x.contiguous(), token, ends),
        *(into[0].dtype == torch.float32, add, outs.cumsum(0), addresses),
    )
