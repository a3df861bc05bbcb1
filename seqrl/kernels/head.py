"""The two passes over a tile of logits: what is kept of it, and its gradient.

In C (head.c) on a CPU in float32 and bfloat16, else in torch's own operations, compiled on CUDA. The
arithmetic is float32 (float64 of float64 logits). Logarithms of probabilities below `FLOOR` count as `FLOOR`:
there the probability is 0, and so is what it adds, even where a logit is minus infinity.

Shape legend: R rows of a tile, W its width in entries of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqrl.kernels.call import SUFFIX, call, fits
from seqrl.kernels.fused import fused

FLOOR = -88.0


def exact(dtype: torch.dtype) -> torch.dtype:
    """What statistics of logits in `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Tile:
    """Logits of R tokens: the entries of the vocabulary from `first` on."""

    logits: Tensor
    """[R, W], rows without gaps within."""
    first: int
    tokens: Tensor
    """[R] int64, indices into the whole vocabulary."""
    scale: float
    """The inverse temperature, which logits are multiplied by."""


@dataclass(frozen=True)
class Sums:
    """What is known of R rows after some of their tiles; `fold` changes it in place. x is a scaled logit."""

    largest: Tensor
    """[R], m, the largest x."""
    total: Tensor
    """[R], the sum of exp(x - m)."""
    moment: Tensor
    """[R], the sum of exp(x - m) (x - m)."""
    squares: Tensor
    """[R], the sum of exp(x - m)^2."""
    chosen: Tensor
    """[R], x of the row's token."""

    @classmethod
    def nothing_yet(cls, rows: int, dtype: torch.dtype, device: torch.device) -> Sums:
        zeros = torch.zeros(5, rows, dtype=dtype, device=device)
        zeros[0] = torch.finfo(dtype).min
        zeros[4] = torch.nan  # and stays so where the vocabulary does not have the token
        return cls(*zeros)

    def of(self, rows: slice) -> Sums:
        """A view of some rows."""
        return Sums(*(x[rows] for x in vars(self).values()))

    @property
    def log_total(self) -> Tensor:
        """[R], the logarithm of the sum of exp(x)."""
        return self.largest + self.total.log()

    @property
    def entropy(self) -> Tensor:
        """[R], nats."""
        return self.total.log() - self.moment / self.total

    @property
    def sum_pi_squared(self) -> Tensor:
        """[R]"""
        return self.squares / self.total.square()


def fold(tile: Tile, into: Sums) -> None:
    """Takes a tile into what is known of its rows."""
    if fits(tile.logits.dtype, tile.logits.dtype, tile.logits.device):
        call(*_arguments("head_fold", tile), *vars(into).values())
        return
    known = vars(into).values()
    made = _fold_by_torch(tile.logits, tile.tokens - tile.first, tile.scale, *known)
    for before, after in zip(known, made, strict=True):
        before.copy_(after)


@fused
def _fold_by_torch(
    logits: Tensor,
    at: Tensor,
    scale: float,
    largest: Tensor,
    total: Tensor,
    moment: Tensor,
    squares: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, ...]:
    """The sums, in their order; `at` [R] are the columns of the rows' tokens, some of them outside."""
    x = _scaled(logits, scale)
    before, largest = largest, torch.maximum(largest, x.amax(1))
    step = before - largest
    keep = step.exp()
    x = x.sub_(largest[:, None]).clamp_(min=FLOOR)
    share = x.exp()
    moment = moment.addcmul(total, step).mul(keep).add(x.mul_(share).sum(1))
    total = total.mul(keep).add(share.sum(1))
    squares = squares.mul(keep.square()).add(share.square_().sum(1))
    here = (at >= 0) & (at < logits.shape[1])
    theirs = logits.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] * scale
    return largest, total, moment, squares, torch.where(here, theirs, chosen)


def gradient(
    tile: Tile,
    log_total: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    out: Tensor,
    minus: Tensor | None = None,
) -> None:
    """Writes p (a + b log p + c p - minus) to `out` [R, W], and d more where a row has its token.

    `log_total`, a, b, c and d are [R], `minus` [R, W]; `out` may be the logits themselves.
    """
    if minus is None and fits(tile.logits.dtype, tile.logits.dtype, tile.logits.device):
        call(*_arguments("head_gradient", tile), log_total, a, b, c, d, out.data_ptr(), out.stride(0))
        return
    at = tile.tokens - tile.first
    _gradient_by_torch(tile.logits, at, tile.scale, log_total, a, b, c, d, out, minus)


@fused
def _gradient_by_torch(
    logits: Tensor,
    at: Tensor,
    scale: float,
    log_total: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    out: Tensor,
    minus: Tensor | None,
) -> None:
    log_p = _scaled(logits, scale).sub_(log_total[:, None]).clamp_(min=FLOOR)
    p = log_p.exp()
    grad = (log_p * b[:, None]).addcmul_(p, c[:, None]).add_(a[:, None])
    if minus is not None:
        grad -= minus.masked_fill(log_p <= FLOOR, 0.0)
    is_token = torch.arange(logits.shape[1], device=at.device) == at[:, None]
    out.copy_(grad.mul_(p).add_(torch.where(is_token, d[:, None], 0.0)))


def _scaled(logits: Tensor, scale: float) -> Tensor:
    """[R, W], of its own memory."""
    return logits.to(exact(logits.dtype), copy=True).mul_(scale)


def _arguments(name: str, tile: Tile) -> tuple[Any, ...]:
    """What both functions in C take, their name first. A tile's rows need not lie side by side."""
    logits = tile.logits
    sizes = (*logits.shape, logits.stride(0), tile.first, tile.scale)
    return f"{name}_{SUFFIX[logits.dtype]}", *sizes, logits.data_ptr(), tile.tokens


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of `logits` [B, V] float32 with one uniform each [B] float64, and its log-prob."""
    logits, tokens = logits.contiguous(), torch.empty(len(logits), dtype=torch.long)
    call("draw", *logits.shape, logits, 1 / temperature, uniforms.contiguous(), tokens)
    # By the function of training, so that it says the same, bit for bit.
    sums = Sums.nothing_yet(len(tokens), torch.float32, logits.device)
    fold(Tile(logits, 0, tokens, 1 / temperature), sums)
    return tokens, sums.chosen - sums.log_total
