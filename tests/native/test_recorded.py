"""The backward pass of those sequences alone that have a gradient, against that of all."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from native_models import KINDS, VOCABULARY
from native_models import build_native as build_eager
from torch import Tensor

import seqrl.training.logprobs
from seqrl.kernels import Record, add_norm, library, linear
from seqrl.training.experts import EXPERTS_NAME, register
from seqrl.training.logprobs import TokenStatistics, response_statistics
from seqrl.types import Batch, to_offsets

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here")

RESPONSES = [[5, 17, 1], [9, 0, 3, 12], [20]]
"""Tokens, of the responses to each prompt."""
PROMPTS = [4, 1, 7]
NONE_OF = {
    "nobody": [],
    "the first of a group, who computes its prompt": [0],
    "a group": [3, 4, 5, 6],
    "the last": [7],
    "all but one": [0, 1, 2, 3, 4, 5, 7],
}
"""Sequences without a gradient."""


def build_native(kind: str) -> Any:
    model = build_eager(kind)
    if model.config.model_type == "qwen3_moe":
        register()
        model.set_experts_implementation(EXPERTS_NAME)
    return model


def make_batch(last_token: int | None = None) -> Batch:
    """`last_token` takes the place of each token of the last sequence's response."""
    generator = torch.Generator().manual_seed(0)
    tokens, mask, lengths, groups = [], [], [], []
    for group, (prompt_length, responses) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        prompt = torch.randint(VOCABULARY - 1, (prompt_length,), generator=generator)
        for length in responses:
            tokens += [prompt, torch.randint(VOCABULARY - 1, (length,), generator=generator)]
            mask += [False] * prompt_length + [True] * length
            lengths.append(prompt_length + length)
            groups.append(group)
    if last_token is not None:
        tokens[-1] = torch.full_like(tokens[-1], last_token)
    n, total = len(lengths), sum(lengths)
    return Batch(
        tokens=torch.cat(tokens),
        response_mask=torch.tensor(mask),
        offsets=to_offsets(torch.tensor(lengths)),
        group=torch.tensor(groups),
        policy_version=torch.zeros(n, dtype=torch.long),
        reward=torch.zeros(n),
        rollout_logprobs=torch.zeros(total),
    )


def slopes(batch: Batch, none_of: list[int]) -> Tensor:
    """A gradient for each log-prob, [R]."""
    sequence = torch.arange(len(batch)).repeat_interleave(batch.response_lengths)
    values = torch.randn(len(sequence), generator=torch.Generator().manual_seed(1))
    return values * ~torch.isin(sequence, torch.tensor(none_of, dtype=torch.long))


def said_of(model: Any, batch: Batch, dtype: torch.dtype = torch.float32, **asked: Any) -> TokenStatistics:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return response_statistics(model, batch, temperature=0.7, entropy=True, **asked)


def is_recorded(said: TokenStatistics) -> bool:
    return "_RecordedLogprobs" in type(said.logprobs.grad_fn).__name__


def gradient(model: Any, said: TokenStatistics, of_logprobs: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    said.logprobs.backward(of_logprobs)
    found = [parameter.grad for parameter in model.parameters()]
    assert all(x is not None for x in found), "an optimizer step would leave these out"
    return [x for x in found if x is not None]


def both(model: Any, batch: Batch, of_logprobs: Tensor, dtype: torch.dtype) -> list[list[Tensor]]:
    """The gradient as it is made, and with a statistic more, of which all sequences have one."""
    recorded, plain = said_of(model, batch, dtype), said_of(model, batch, dtype, sum_pi_squared=True)
    assert is_recorded(recorded) and not is_recorded(plain)
    assert torch.equal(recorded.logprobs, plain.logprobs)
    assert recorded.entropy is not None and plain.entropy is not None
    assert torch.equal(recorded.entropy, plain.entropy) and not recorded.entropy.requires_grad
    return [gradient(model, said, of_logprobs) for said in (recorded, plain)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    gap = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return float(gap / sum(b.double().square().sum() for b in theirs)) ** 0.5


@pytest.mark.parametrize("none_of", NONE_OF.values(), ids=NONE_OF)
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"qwen3, narrow heads"}))
def test_the_gradient_is_that_of_all(kind: str, none_of: list[int], threads: int) -> None:
    batch = make_batch()
    ours, theirs = both(build_native(kind), batch, slopes(batch, none_of), torch.float32)
    assert distance(ours, theirs) < 1e-6
    if none_of == []:  # an empty response has no gradient: the others go backward, as if it were not there
        full = make_batch().select([i for i, n in enumerate(batch.response_lengths) if n])
        ours, theirs = both(build_native(kind), full, slopes(full, []), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "bit for bit"


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe, 64 experts"])
def test_bfloat16(kind: str) -> None:
    """Weights' gradients are rounded to it: where they lie between two numbers it may be the other."""
    batch = make_batch()
    ours, theirs = both(build_native(kind), batch, slopes(batch, [0, 3, 7]), torch.bfloat16)
    assert distance(ours, theirs) < 1e-3


def test_a_vocabulary_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are not kept, but made again for the gradient."""
    monkeypatch.setattr(seqrl.training.logprobs, "MAX_LOGITS", 100)
    batch = make_batch()
    ours, theirs = both(build_native("qwen3"), batch, slopes(batch, [1, 6]), torch.float32)
    assert distance(ours, theirs) < 1e-6


def test_where_nobody_has_a_gradient_it_is_zero() -> None:
    model, batch = build_native("qwen3_moe, one layer dense"), make_batch()
    found = gradient(model, said_of(model, batch), torch.zeros(int(batch.response_mask.sum())))
    assert not any(x.any() for x in found)


def test_an_empty_response_has_no_gradient() -> None:
    model, batch = build_native("qwen3"), make_batch().select([4])
    assert int(batch.response_mask.sum()) == 0
    assert not any(x.any() for x in gradient(model, said_of(model, batch), torch.empty(0)))


def test_whoever_has_no_gradient_does_not_go_backward() -> None:
    """A token that is not a number, in a sequence of gradient 0: times 0 it would not be a number either."""
    model, poison = build_native("qwen3"), VOCABULARY - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan
    batch = make_batch(last_token=poison)
    recorded, plain = said_of(model, batch), said_of(model, batch, sum_pi_squared=True)
    assert all(x.isfinite().all() for x in gradient(model, recorded, slopes(batch, [7])))
    assert not all(x.isfinite().all() for x in gradient(model, plain, slopes(batch, [7])))


def test_what_has_been_added_to_the_stream_is_not_kept() -> None:
    """It would be a tenth of the memory of a forward, and no gradient needs it."""
    x, weight = torch.randn(6, 32), torch.randn(32, 32)
    record = Record()
    with torch.no_grad(), record.recording():
        other, delta = linear(x, weight), linear(x, weight)
        seen = [weakref.ref(other), weakref.ref(delta)]
        add_norm(x, delta, torch.ones(32), 1e-6, torch.float32)
        del other, delta
    assert seen[0]() is not None and seen[1]() is None


@pytest.mark.parametrize("asked", [{"entropy_gradient": True}, {"sum_pi_squared": True}], ids=str)
def test_other_statistics_have_their_gradient(asked: dict[str, Any]) -> None:
    assert not is_recorded(said_of(build_native("qwen3"), make_batch(), **asked))


@pytest.mark.parametrize("none_of", [[], [0, 3, 7]])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe, one layer dense"])
def test_layers_that_are_run_again(kind: str, none_of: list[int]) -> None:
    model, batch = build_native(kind), make_batch()
    kept, _ = both(model, batch, slopes(batch, none_of), torch.float32)
    model.gradient_checkpointing_enable()
    ours, theirs = both(model, batch, slopes(batch, none_of), torch.float32)
    assert distance(ours, theirs) < 1e-6
    assert distance(ours, kept) < 1e-6


def test_what_is_not_in_c_is_not_recorded() -> None:
    assert not is_recorded(said_of(build_native("qwen3, narrow heads"), make_batch()))
    assert not is_recorded(said_of(build_native("qwen3").double(), make_batch()))


def test_weights_that_are_not_trained_have_no_gradient() -> None:
    model, batch = build_native("qwen2, tied"), make_batch()
    theirs = gradient(model, said_of(model, batch), slopes(batch, [2]))
    model.zero_grad(set_to_none=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    said_of(model, batch).logprobs.backward(slopes(batch, [2]))
    ours = [parameter.grad for parameter in model.parameters()]
    assert ours[0] is None
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
