"""Micro-batches within their budget, and a flat row in which sequences do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqrl.errors import UserError
from seqrl.training.forward import reads_prompts_in_place
from seqrl.training.logprobs import response_statistics
from seqrl.training.model import check_flat_forward
from seqrl.training.packing import (
    Layout,
    Split,
    by_count,
    by_tokens,
    padded_attention,
    prompt_lengths,
    shared_prompts,
    varlen_attention,
)
from seqrl.types import Batch, to_offsets

LENGTHS = [5, 13, 1, 8, 13]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 80))
def test_by_tokens_takes_each_sequence_once_and_keeps_to_the_budget(lengths: list[int], budget: int) -> None:
    parts = by_tokens(lengths, budget)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in parts)


def test_by_tokens_makes_no_part_larger_than_it_has_to_be() -> None:
    lengths = [5] * 20
    assert [len(part) for part in by_tokens(lengths, 90)] == [10, 10]
    assert [len(part) for part in by_tokens(lengths, 45)] == [7, 7, 6]


def test_by_tokens_puts_the_longest_first_and_like_with_like() -> None:
    assert by_tokens([3, 9, 4, 9, 2], 18) == [[1, 3], [2, 0, 4]]
    assert by_tokens([3, 30, 4], 10) == [[1], [2, 0]], "one longer than the budget goes alone"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=30),
    st.lists(st.integers(0, 30), min_size=4, max_size=4),
    st.integers(1, 80),
)
def test_by_tokens_counts_a_prompt_once_in_each_part(
    responses: list[tuple[int, int]], prompts: list[int], budget: int
) -> None:
    lengths = [prompts[group] + response for group, response in responses]
    parts = by_tokens(lengths, budget, [(group, prompts[group]) for group, _ in responses])
    assert sorted(index for part in parts for index in part) == list(range(len(responses)))
    for part in parts:
        read = {responses[i][0] for i in part}
        tokens = sum(prompts[group] for group in read) + sum(responses[i][1] for i in part)
        assert len(part) == 1 or tokens <= budget
    assert len(parts) <= len(by_tokens(lengths, budget))


def test_a_split_counts_a_groups_prompt_once_if_told(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([(3, 4), (3, 4), (2, 5), (2, 6)])  # 3 + 4 + 4 and 2 + 5 + 6 tokens
    assert Split(24)(batch, prompts_once=True) == [[3, 0, 1, 2]]
    assert Split(23)(batch, prompts_once=True) == [[3, 0], [1, 2]]
    assert Split(24)(batch, prompts_once=False) == [[3, 0], [1, 2]]
    assert Split(24, 3)(batch, prompts_once=True) == [[0, 1, 2], [3]], "by count whatever they are"


def test_prompts_are_read_in_place_by_the_native_forward_alone(make_model: Callable[..., Any]) -> None:
    model = make_model("qwen3", head_dim=32)
    assert reads_prompts_in_place(model, torch.float32) and reads_prompts_in_place(model, torch.bfloat16)
    assert not reads_prompts_in_place(model.double(), torch.float64), "there is no C for it"
    assert not reads_prompts_in_place(make_model("qwen3"), torch.float32), "halves of heads fill no vector"
    gemma = make_model("gemma2", head_dim=32)
    assert not reads_prompts_in_place(gemma, torch.float32), "transformers' own forward"


def test_by_count_splits_in_order() -> None:
    assert by_count(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert by_count(2, 8) == [[0, 1]]


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4], [7]])
def test_what_a_layout_pads_it_flattens_again(lengths: list[int]) -> None:
    layout = Layout.of(to_offsets(torch.tensor(lengths)))
    total = sum(lengths)
    x = torch.arange(2 * total * 3.0).reshape(1, 2, total, 3)  # [1, H, T, D]
    padded = layout.pad(x)
    assert padded.shape == (len(lengths), 2, max(lengths), 3)
    start = 0
    for row, length in enumerate(lengths):
        assert torch.equal(padded[row, :, :length], x[0, :, start : start + length])
        assert layout.positions[start : start + length].tolist() == list(range(length))
        start += length
    assert torch.equal(layout.flatten(padded), x.transpose(1, 2))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*FAMILIES.items(), ("qwen2", SLIDING)],
    ids=[*FAMILIES, "qwen2 with a sliding window"],
)
def test_flat_logits_are_transformers_own_of_each_sequence_alone(
    make_model: Callable[..., Any], family: str, overrides: dict[str, Any]
) -> None:
    ours = make_model(family, **overrides)
    theirs = make_model(family, attention="sdpa", **overrides)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(1, 48, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    layout = Layout.of(to_offsets(torch.tensor(LENGTHS)))
    with torch.no_grad():
        flat = ours(tokens[None], position_ids=layout.positions[None], use_cache=False, layout=layout).logits
        alone = [theirs(part[None], use_cache=False).logits for part in tokens.split(LENGTHS)]
    assert flat.std() > 0.1
    torch.testing.assert_close(flat, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_a_sliding_window_is_seen(make_model: Callable[..., Any]) -> None:
    """Else the test above would pass with the window forgotten on both sides."""
    tokens = torch.arange(1, 14)
    layout = Layout.of(torch.tensor([0, 13]))
    with torch.no_grad():
        without, within = (
            make_model("qwen2", **overrides)(
                tokens[None], position_ids=layout.positions[None], use_cache=False, layout=layout
            ).logits
            for overrides in ({}, SLIDING)
        )
    torch.testing.assert_close(without[:, :4], within[:, :4])
    assert (without[:, 5:] - within[:, 5:]).abs().max() > 1e-3


def test_the_flat_models_own_forward_is_untouched(make_model: Callable[..., Any]) -> None:
    """Called as anyone would call it, with padding on the left or without, it is transformers' own."""
    ours, theirs = make_model("qwen3"), make_model("qwen3", attention="sdpa")
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        for arguments in ({}, {"attention_mask": mask}):
            one, other = (model(tokens, **arguments).logits[:, 2:] for model in (ours, theirs))
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_we_train_pass_the_check(make_model: Callable[..., Any], family: str) -> None:
    check_flat_forward(make_model(family))


class Leaky(torch.nn.Module):
    """A model that mixes each token with those before it, whatever sequence they belong to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **arguments: Any) -> Any:
        out = self.model(**arguments)
        out.logits = out.logits.cumsum(1)
        return out


def test_a_model_whose_sequences_see_each_other_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"Leaky lets sequences of one micro-batch see each other \(.*%\)"):
        check_flat_forward(Leaky(make_model("qwen3")))


def test_a_recurrent_model_is_refused() -> None:
    """A real one: Mamba carries its state along the row."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 32}
    with pytest.raises((UserError, TypeError)):
        check_flat_forward(MambaForCausalLM(MambaConfig(**sizes)))


def test_the_prompt_of_a_group_is_computed_once(make_model: Callable[..., Any]) -> None:
    """Two groups, one of them with a stranger whose prompt differs: results and gradients stay the same."""
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [5, 6, 4]]
    answers = [[1, 2], [3], [4, 5, 6], [], [7, 8]]
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    tokens = [token for p, a in zip(prompts, answers, strict=True) for token in (*p, *a)]
    mask = [
        flag for p, a in zip(prompts, answers, strict=True) for flag in [False] * len(p) + [True] * len(a)
    ]
    batch = Batch(
        tokens=torch.tensor(tokens),
        response_mask=torch.tensor(mask),
        offsets=to_offsets(torch.tensor(lengths)),
        group=torch.tensor([3, 1, 3, 1, 3]),
        policy_version=torch.zeros(5, dtype=torch.long),
        reward=torch.zeros(5),
        rollout_logprobs=torch.zeros(len(tokens)),
    )
    stand_in = shared_prompts(batch, prompt_lengths(batch))
    assert stand_in.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 11, 12, 13, 5, 6, 16, 17, 18, 19, 20]
    apart = replace(batch, group=torch.arange(5))
    assert Layout.of(batch.offsets, stand_in).computed.numel() == len(tokens) - 5
    assert torch.equal(shared_prompts(apart, prompt_lengths(apart)), torch.arange(len(tokens)))

    model = make_model("qwen3").double()
    weight = torch.randn(sum(mask), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for part in (batch, apart):
        model.zero_grad()
        logprobs = response_statistics(model, part, temperature=1.0).logprobs
        (logprobs * weight).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    once, twice = gradients
    assert (once - twice).norm() < 1e-6 * twice.norm(), "transformers' norms round to float32"


def flash(query: Any, keys: Any, values: Any, q_at: Any, k_at: Any, *_: int, **options: Any) -> torch.Tensor:
    """What `varlen_attn` does on a GPU: the queries of a sequence are the last of its keys."""
    assert options == {"window_size": (-1, 0), "enable_gqa": True}
    outs = []
    for i in range(len(q_at) - 1):
        q = query[q_at[i] : q_at[i + 1]]
        k, v = (x[k_at[i] : k_at[i + 1]].repeat_interleave(2, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outs)


def test_attention_of_variable_length_is_padded_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third sequence begins with the first's prompt, the fourth has no response. Gradients, too."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    stand_in = torch.tensor([*range(8), 0, 1, 2, 11, 12, 13, 5, 6, *range(16, 21)])
    layout = Layout.of(to_offsets(torch.tensor([5, 3, 6, 2, 5])), stand_in)
    assert layout.borrowed.tolist() == [8, 9, 10, 14, 15]
    heads = [
        torch.randn(len(layout.computed), count, 8, dtype=torch.float64, requires_grad=True)
        for count in (4, 2, 2)
    ]
    padded = padded_attention(*(x.transpose(0, 1)[None] for x in heads), layout)[0]
    ours = varlen_attention(*heads, layout)
    torch.testing.assert_close(ours, padded)
    toward = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, heads, toward), torch.autograd.grad(padded, heads, toward)
    )
