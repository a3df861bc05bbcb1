"""From hidden states to log-probs, without logits of all tokens over the whole vocabulary.

The forward pass computes logits tile by tile, some tokens by some entries of the vocabulary, and keeps a few
numbers a token; the backward pass computes each tile anew, makes its gradient in its place, and adds what
follows from it to the gradients of hidden states, weight and bias. With p the probabilities, logit j has the
gradient

    log-prob of token t      1[j = t] - p_j
    entropy E                -p_j (log p_j + E)
    sum S of squares         2 p_j (p_j - S)
    KL from reference q      p_j (log p_j - log q_j - KL)

which is p_j (a + b log p_j + c p_j) with a, b and c of the token, and what is said of t and q. All tokens see
some entries of the vocabulary before the next: their rows of the weight are read once and their gradient is
written once. Where all logits are few, they are one tile, which is kept.

Shape legend: R tokens, H hidden, V vocabulary; a tile is some of R by some of V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels import Tiles, add_weight_gradient, matrix, product, product_backward
from seqrl.kernels.head import Sums, Tile, exact, fold, gradient
from seqrl.kernels.record import current, made

MAX_LOGITS = 2**25
"""Most logits held at once, as numbers; more are computed tile by tile, and anew in the backward pass."""
TILE, LARGE_TILE = 2**21, 2**27
"""Logits of a tile, as numbers: 8 MiB of float32 on a CPU, so that they stay in its last cache; on other
devices as many as fill them."""
TILE_ROWS, LARGE_TILE_ROWS = 2048, 8192
"""Most tokens of a tile, likewise."""
LARGE_TILE_COLUMNS = 2**14
"""Most entries of the vocabulary of a tile on other devices, so that kernels know its width."""


@dataclass(frozen=True)
class TokenStatistics:
    """Of R response tokens, float32 (float64 of a float64 model); None where not asked for."""

    logprobs: Tensor
    """[R]"""
    entropy: Tensor | None = None
    """[R], nats; without gradient unless asked for."""
    sum_pi_squared: Tensor | None = None
    """[R], the sum over the vocabulary of squared probabilities."""
    full_kl: Tensor | None = None
    """[R], KL(policy || reference) over the whole vocabulary."""

    def first(self, count: int) -> TokenStatistics:
        """Of the first `count` tokens."""
        others = (self.entropy, self.sum_pi_squared, self.full_kl)
        return TokenStatistics(self.logprobs[:count], *(None if x is None else x[:count] for x in others))


@dataclass(frozen=True)
class Logits:
    """[R, V], not computed yet: hidden states times the transposed weight, plus bias."""

    hidden: Tensor
    """[R, H]; the logits themselves where there is no weight."""
    weight: Tensor | None = None
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""

    @property
    def vocabulary(self) -> int:
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def ready(self) -> Logits:
        """Detached, hidden states in the type of the product: autocast's, where it is on."""
        hidden, device = self.hidden.detach(), self.hidden.device.type
        if self.weight is not None and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return replace(self, hidden=hidden.contiguous())

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Of these tokens and entries of the vocabulary."""
        if self.weight is None:
            return self.hidden[rows, columns]
        bias = None if self.bias is None else self.bias[columns].to(self.hidden.dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):
            return product(self.hidden[rows], self.matrix(columns), bias)

    def matrix(self, columns: slice) -> Tensor | Tiles:
        """The rows of the weight for these entries, as products with the hidden states want them."""
        assert self.weight is not None
        return matrix(self.weight[columns], dtype=self.hidden.dtype)


@dataclass(frozen=True)
class _Asked:
    scale: float
    """The inverse temperature."""
    entropy_gradient: bool
    keep: bool
    """All logits are one tile, kept for the backward pass."""
    most: int
    """Logits of a tile, at most."""
    most_rows: int
    """Tokens of a tile, at most."""
    most_columns: int | None
    """Entries of the vocabulary of a tile, at most; None: any number."""

    def tiles(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """That cover [rows, columns]."""
        height = max(rows if self.keep else min(rows, self.most_rows, self.most), 1)
        width = (
            columns if self.keep else min(max(self.most // height, 1), self.most_columns or columns, columns)
        )
        for left in range(0, columns, width):
            for top in range(0, rows, height):
                yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def token_statistics(
    logits: Logits,
    tokens: Tensor,
    *,
    temperature: float,
    entropy: bool = False,
    entropy_gradient: bool = False,
    sum_pi_squared: bool = False,
    reference: Logits | None = None,
    max_logits: int = MAX_LOGITS,
) -> TokenStatistics:
    """What a distribution over the vocabulary says of each of `tokens` [R] int64, and of itself.

    Gradients reach hidden states, weight and bias, where they ask for one; none reaches the reference.

    Args:
        temperature: logits are divided by it, those of the reference, too.
        entropy_gradient: the entropy is asked for, and carries gradient.
        reference: the full KL divergence from it is asked for.
        max_logits: so many are kept for the backward pass, and no tile is larger.
    """
    keep = logits.weight is None or (
        (torch.is_grad_enabled() or current() is not None)
        and tokens.numel() * logits.vocabulary <= max_logits
    )
    on_cpu = tokens.device.type == "cpu"
    most = min(TILE if on_cpu else LARGE_TILE, max_logits)
    most_rows, most_columns = (TILE_ROWS, None) if on_cpu else (LARGE_TILE_ROWS, LARGE_TILE_COLUMNS)
    logprobs, entropies, squares, kl = _Statistics.apply(
        logits.hidden,
        logits.weight,
        logits.bias,
        tokens.contiguous(),
        None if reference is None else reference.ready(),
        _Asked(1 / temperature, entropy_gradient, keep, most, most_rows, most_columns),
    )
    return TokenStatistics(
        logprobs,
        entropies if entropy or entropy_gradient else None,
        squares if sum_pi_squared else None,
        kl,
    )


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        reference: Logits | None,
        asked: _Asked,
    ) -> tuple[Tensor | None, ...]:
        logits = Logits(hidden, weight, bias).ready()
        logprobs, *saved = made(lambda: _folded(logits, tokens, reference, asked))
        kept, log_total, entropy, squares, ref_log_total, kl = saved
        asked = replace(asked, keep=weight is None or kept is not None)
        ctx.save_for_backward(
            *(logits.hidden, weight, bias, tokens, kept),
            *(log_total, entropy, squares, ref_log_total, kl),
        )
        ctx.reference, ctx.asked, ctx.hidden_dtype = reference, asked, hidden.dtype
        ctx.set_materialize_grads(False)
        if not asked.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, squares, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, kept, log_total, entropy, squares, ref_log_total, kl = ctx.saved_tensors
        logits, asked, reference = Logits(hidden, weight, bias), ctx.asked, ctx.reference
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=log_total.dtype) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias else None

        factors, of_kl = _factors(grads, entropy, squares, kl) * asked.scale, grads[3]
        for rows, columns in asked.tiles(tokens.numel(), logits.vocabulary):
            tile = Tile(
                logits.tile(rows, columns) if kept is None else kept, columns.start, tokens[rows], asked.scale
            )
            minus = None
            if reference is not None and of_kl is not None:
                log_q = reference.tile(rows, columns).to(log_total.dtype) * asked.scale
                minus = (log_q - ref_log_total[rows, None]) * (asked.scale * of_kl[rows, None])
            out = torch.empty_like(tile.logits) if weight is None else tile.logits
            gradient(tile, log_total[rows], *(x[rows] for x in factors), minus=minus, out=out)
            if weight is None:
                return out, *[None] * 5
            of_tile = logits.matrix(columns)
            if grad_hidden is not None:
                grad_hidden[rows] += product_backward(out, of_tile)
            if grad_weight is not None:
                add_weight_gradient(grad_weight[columns], out, hidden[rows], of_tile)
            if grad_bias is not None:
                grad_bias[columns] += out.sum(0, dtype=grad_bias.dtype)
            del tile, out  # before the next is there
        if kept is not None:
            torch.autograd.graph.increment_version(kept)  # its gradient is in its place: no second backward
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _folded(
    logits: Logits, tokens: Tensor, reference: Logits | None, asked: _Asked
) -> tuple[Tensor | None, ...]:
    """Log-probs, the one tile where it is kept, log-sum-exp, entropy, sum of squares; log-sum-exp of the
    reference and the KL divergence from it."""
    count, dtype = tokens.numel(), exact(logits.hidden.dtype)
    sums, ref_sums = (Sums.nothing_yet(count, dtype, logits.hidden.device) for _ in range(2))
    gap = torch.zeros_like(sums.total)
    kept = None
    for rows, columns in asked.tiles(count, logits.vocabulary):
        tile = Tile(logits.tile(rows, columns), columns.start, tokens[rows], asked.scale)
        before = sums.largest[rows].clone()
        fold(tile, sums.of(rows))
        if reference is not None:
            theirs = replace(tile, logits=reference.tile(rows, columns))
            fold(theirs, ref_sums.of(rows))
            gap[rows].mul_((before - sums.largest[rows]).exp())
            gap[rows] += _gap(tile, theirs, sums.largest[rows])
        kept = tile.logits if asked.keep and logits.weight is not None else None
    log_total, ref_log_total, kl = sums.log_total, None, None
    if reference is not None:
        ref_log_total = ref_sums.log_total
        kl = gap / sums.total - log_total + ref_log_total
    return sums.chosen - log_total, kept, log_total, sums.entropy, sums.sum_pi_squared, ref_log_total, kl


def _factors(grads: tuple[Tensor | None, ...], entropy: Tensor, squares: Tensor, kl: Tensor | None) -> Tensor:
    """a, b, c and what the token's own logit gets more: [4, R]."""
    of_logprobs, of_entropy, of_squares, of_kl = grads
    factors = torch.zeros(4, *entropy.shape, dtype=entropy.dtype, device=entropy.device)
    a, b, c, own = factors
    if of_logprobs is not None:
        a -= of_logprobs
        own += of_logprobs
    if of_entropy is not None:
        a -= of_entropy * entropy
        b -= of_entropy
    if of_squares is not None:
        a -= 2 * of_squares * squares
        c += 2 * of_squares
    if of_kl is not None:
        assert kl is not None
        a -= of_kl * kl
        b += of_kl
    return factors


def _gap(tile: Tile, theirs: Tile, largest: Tensor) -> Tensor:
    """[R], the sum of exp(x - largest) (x - y) over the scaled logits x of a tile and y of the reference."""
    dtype = largest.dtype
    x, y = (each.logits.to(dtype) * each.scale for each in (tile, theirs))
    share = (x - largest[:, None]).exp()
    return (share * (x - y).masked_fill(share == 0, 0.0)).sum(1)
