"""Attention in C over flat tokens with shared prompts, against plain softmax attention of each whole sequence
in float64, where nothing is shared: values and gradients."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import BF16, ERROR, F32, TYPE_IDS, TYPES, double, near, random, results
from torch import Tensor

from seqrl.kernels import Spans, Turn, attend, self_attention
from seqrl.training.packing import Layout
from seqrl.types import Batch, to_offsets

pytestmark = pytest.mark.usefixtures("c_only")

Groups = list[tuple[int, list[int]]]
"""The length of a prompt, and those of its responses."""
SMALL: Groups = [(5, [3, 7, 1])]
MANY: Groups = [(1, [1]), (70, [20, 1, 33, 0]), (16, [16, 16]), (3, [61]), (17, [0, 0]), (64, [64])]


def layout_of(groups: Groups) -> Layout:
    """As training lays them out, the prompt of a group computed by its first."""
    pairs = torch.tensor([(prompt, response) for prompt, responses in groups for response in responses])
    lengths = pairs.sum(1)
    group = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(r) for _, r in groups]))
    mask = torch.tensor([False, True]).repeat(len(pairs)).repeat_interleave(pairs.flatten())
    batch = Batch(
        tokens=torch.zeros(len(mask), dtype=torch.long),
        response_mask=mask,
        offsets=to_offsets(lengths),
        group=group,
        policy_version=torch.zeros(len(pairs), dtype=torch.long),
        reward=torch.zeros(len(pairs)),
        rollout_logprobs=torch.zeros(len(mask)),
    )
    return Layout.of_batch(batch)


def plain(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Every sequence whole, token by token; the output of the computed tokens, and its log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    lengths = (layout.spans.shared_columns + layout.spans.own_columns)[: layout.sequences].tolist()
    outs, sums = [], []
    for index in layout.source.split(lengths):
        keys, values = (x[index].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[index], keys) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(index), len(index), dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1).t())
    return torch.cat(outs)[layout.computed], torch.cat(sums)[layout.computed]


def inputs_of(layout: Layout, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    tokens = len(layout.computed)
    return [random(tokens, count, size, seed=i) for i, count in enumerate((heads, kv_heads, kv_heads))]


# Group sizes 1, 2, 4 and 8, one key head among them; lengths on both sides of 16 lanes and 64 keys.
SHAPES = [(2, 2, 32), (4, 2, 64), (4, 1, 96), (8, 1, 128), (6, 2, 32)]


@pytest.mark.parametrize("groups", [SMALL, MANY], ids=["small", "many"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_attend(threads: int, groups: Groups, heads: int, kv_heads: int, size: int) -> None:
    layout = layout_of(groups)
    assert bool(layout.spans.shared_columns.any())
    tensors = inputs_of(layout, heads, kv_heads, size)
    near(attend(*tensors, layout.spans), plain(*double(*tensors), layout), ERROR[F32])


def test_attend_in_bfloat16() -> None:
    layout = layout_of(MANY)
    tensors = inputs_of(layout, 4, 2, 64)
    out, lse = attend(*(x.to(BF16) for x in tensors), layout.spans)
    assert (out.dtype, lse.dtype) == (BF16, F32)
    exact = plain(*double(*tensors), layout)
    near([out], exact[:1], ERROR[BF16])
    near([lse], exact[1:], ERROR[F32])


def test_values_may_lie_among_the_projections() -> None:
    layout = layout_of(SMALL)
    qkv = random(len(layout.computed), 8, 32)
    q, k, v = qkv.split([4, 2, 2], dim=1)
    near(attend(q, k, v, layout.spans), plain(*double(q, k, v), layout), ERROR[F32])


def self_attention_by_formula(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, layout: Layout, turn: Turn
) -> Tensor:
    cos, sin = (table.double()[layout.positions][:, None] for table in (turn.cos, turn.sin))

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + turn.eps).sqrt() * weight
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    rows = qkv.view(len(qkv), -1, turn.size)
    q, k, v = rows.split([turn.heads, turn.kv_heads, turn.kv_heads], dim=1)
    return plain(one(q, q_weight), one(k, k_weight), v, layout)[0].flatten(1)


def turn_of(heads: int, kv_heads: int, size: int, length: int) -> Turn:
    angles = torch.arange(length)[:, None] * 100.0 ** -(torch.arange(0, size, 2) / size)
    return Turn(heads, kv_heads, size, angles.cos(), angles.sin(), eps=1e-2)


def check_self_attention(
    groups: Groups, shape: tuple[int, int, int], normed: bool, stream: torch.dtype, dtype: torch.dtype
) -> None:
    heads, kv_heads, size = shape
    layout, turn = layout_of(groups), turn_of(*shape, 700)
    qkv = random(len(layout.computed), (heads + 2 * kv_heads) * size)
    weights = (1 + random(size, seed=1), 1 + random(size, seed=2)) if normed else (None, None)
    weights = tuple(None if w is None else w.to(BF16).float() for w in weights)

    def ours(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> Tensor:
        return self_attention(qkv, q_weight, k_weight, layout.positions, turn, layout.spans)

    inputs = [qkv.to(dtype), *(None if w is None else w.to(stream) for w in weights)]
    exact = results(lambda *x: self_attention_by_formula(*x, layout, turn), *double(qkv, *weights))
    made = results(ours, *inputs)
    assert [x.dtype for x in made] == [dtype, dtype] + [stream] * (2 * normed)
    near(made, exact, 2 * ERROR[dtype])
    with torch.no_grad():
        assert torch.equal(ours(*inputs), made[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_self_attention(threads: int, shape: tuple[int, int, int]) -> None:
    check_self_attention(MANY, shape, True, F32, F32)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("stream", "dtype"), TYPES, ids=TYPE_IDS)
def test_self_attention_in_each_type(normed: bool, stream: torch.dtype, dtype: torch.dtype) -> None:
    check_self_attention(MANY, (4, 2, 32), normed, stream, dtype)


def test_a_long_sequence() -> None:
    """Longer than any block, with scores that would overflow an exponential."""
    layout = Layout.of(torch.tensor([0, 1501]))
    q, k, v = inputs_of(layout, 2, 1, 32)
    tensors = [20 * q, 20 * k, v]
    exact = plain(*double(*tensors), layout)
    assert exact[1].max() > 500
    # Scores of some hundreds carry an error of their own into the exponent.
    near(attend(*tensors, layout.spans), exact, 1e-4)
    check_self_attention([(1, [170])], (2, 1, 32), False, F32, F32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sums_are_divided_exactly(dtype: torch.dtype) -> None:
    """Of keys that all weigh 1 the mean is half-way between two bfloat16 numbers, or beside it: a quotient
    off by its last bit is rounded to the other one."""
    layout = Layout.of(torch.tensor([0, 600]))
    zeros = torch.zeros(600, 1, 32, dtype=dtype)
    v = (254 + torch.arange(600) % 2).to(dtype)[:, None, None].expand(-1, 1, 32).contiguous()
    mean = v.double().cumsum(0) / torch.arange(1, 601)[:, None, None]
    assert torch.equal(attend(zeros, zeros, v, layout.spans)[0], mean.float().to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sequences_that_several_tasks_share(threads: int, dtype: torch.dtype) -> None:
    """Their keys have gradients from all of them, and a prompt's from those that it belongs to, too."""
    check_self_attention([(140, [150, 3]), (5, [500, 7, 129])], (2, 1, 32), True, F32, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_no_number_stays_in_its_sequence(dtype: torch.dtype) -> None:
    layout = layout_of([(5, [30]), (5, [30, 4])])
    turn = turn_of(2, 1, 32, 64)

    def run(qkv: Tensor) -> list[Tensor]:
        return results(lambda x: self_attention(x, None, None, layout.positions, turn, layout.spans), qkv)

    clean = random(len(layout.computed), 4 * 32).to(dtype)
    spoiled = clean.clone()
    spoiled[20] = torch.nan
    for before, after in zip(run(clean), run(spoiled), strict=True):
        assert torch.equal(before[35:], after[35:])
        assert not torch.equal(before[:35], after[:35])
    out, gradient = run(spoiled)
    assert out[20:35].isnan().all()
    assert gradient[20].isnan().any()


def test_scratch_space_left_by_one_call_is_not_read_by_the_next() -> None:
    """The same twice, with other sizes in between: equal to the last bit."""
    layout, other = layout_of(MANY), layout_of(SMALL)
    tensors = inputs_of(layout, 4, 2, 64)
    first = attend(*tensors, layout.spans)
    attend(*(torch.full_like(x, torch.nan) for x in inputs_of(other, 8, 1, 128)), other.spans)
    for one, two in zip(first, attend(*tensors, layout.spans), strict=True):
        assert torch.equal(one, two)


def test_no_tokens() -> None:
    none = torch.empty(0, dtype=torch.long)
    out, lse = attend(torch.empty(0, 4, 32), torch.empty(0, 2, 32), torch.empty(0, 2, 32), Spans(*[none] * 4))
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)
    qkv = torch.empty(0, 8 * 32, requires_grad=True)
    self_attention(qkv, None, None, none, turn_of(4, 2, 32, 4), Spans(*[none] * 4)).sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("spoiled", [0.0, torch.nan])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tokens_of_no_sequence_get_nothing_and_change_nothing(spoiled: float, dtype: torch.dtype) -> None:
    """A row may be filled up to a round number of tokens."""
    layout, turn, weight = layout_of(SMALL), turn_of(4, 2, 32, 64), random(32, seed=1)
    count = len(layout.computed)
    short = random(count, 8 * 32).to(dtype)
    filled = torch.cat([short, torch.full((5, 8 * 32), spoiled, dtype=dtype)])

    def run(qkv: Tensor) -> list[Tensor]:
        positions = torch.cat([layout.positions, torch.zeros(len(qkv) - count, dtype=torch.long)])
        x, q_weight = qkv.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.full((3, count, 4 * 32), torch.nan)  # what memory that is used again may hold
        out = self_attention(x, q_weight, weight, positions, turn, layout.spans)
        out[:count].backward(random(count, 4 * 32, seed=7).to(dtype))
        return [out.detach(), x.grad, q_weight.grad]

    for of_short, of_filled in zip(run(short)[:2], run(filled)[:2], strict=True):
        assert torch.equal(of_short, of_filled[:count])
        if not spoiled:
            assert not of_filled[count:].any()
    if not spoiled:
        torch.testing.assert_close(run(short)[2], run(filled)[2])


def test_sequences_apart_give_what_a_shared_prompt_gives() -> None:
    """The other road through `Layout`: nobody shares, and every prompt is computed again."""
    shared = layout_of(SMALL)
    lengths = (shared.spans.shared_columns + shared.spans.own_columns)[: shared.sequences]
    apart = Layout.of(to_offsets(lengths))
    assert not bool(apart.spans.shared_columns.any())
    tensors = inputs_of(shared, 4, 2, 32)
    once = attend(*tensors, shared.spans)[0]
    again = attend(*(x[shared.source] for x in tensors), apart.spans)[0]
    torch.testing.assert_close(once[shared.source], again, rtol=1e-5, atol=1e-6)
