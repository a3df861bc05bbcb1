"""Which experts response tokens are sent to: before and after, packed in any way, in any kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from seqrl.algos.drift import expert_drift
from seqrl.training.experts import expert_layers
from seqrl.training.forward import response_routing
from seqrl.types import Batch

LENGTHS = [(3, 9), (3, 1), (2, 0), (4, 14), (5, 2)]


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """The first two share their prompt, which is computed once."""
    batch = make_batch(LENGTHS)
    tokens = batch.tokens.clone()
    tokens[12:15] = tokens[:3]
    return replace(batch, tokens=tokens)


def drift(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[float]:
    return [float(expert_drift(*pair)) for pair in zip(before, after, strict=True)]


def by_transformers(model: Any, batch: Batch, sequence: int) -> list[torch.Tensor]:
    """Of one sequence by itself, without any packing: the router's largest logits, layer by layer."""
    start, end = batch.offsets[sequence], batch.offsets[sequence + 1]
    with torch.no_grad():
        out = model(batch.tokens[start:end][None], output_router_logits=True)
    chosen = [logits.topk(2, dim=-1).indices for logits in out.router_logits]
    return [experts[batch.response_mask[start:end]] for experts in chosen]


def test_they_are_the_routers_choice_token_by_token(make_model: Callable[..., Any], batch: Batch) -> None:
    model = make_model()
    with torch.no_grad():
        ours = response_routing(model, expert_layers(model), batch)
    assert [tuple(layer.shape) for layer in ours] == [(26, 2)] * 2
    alone = [by_transformers(model, batch, i) for i in range(len(batch))]
    for layer, experts in enumerate(ours):
        theirs = torch.cat([of_sequence[layer] for of_sequence in alone])
        assert torch.equal(experts.sort(-1).values, theirs.sort(-1).values)
    assert len(ours[0].unique()) > 2, "not always the same"


def test_the_order_of_tokens_does_not_depend_on_micro_batches(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    model = make_model()
    found = [make_engine(model, max_tokens=most).routing(batch) for most in (10_000, 25, 1)]
    for other in found[1:]:
        assert drift(found[0], other) == [0, 0]
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_the_same_weights_do_not_drift_and_another_router_does(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    engine = make_engine(make_model())
    before = engine.routing(batch)
    assert drift(before, engine.routing(batch)) == [0, 0]
    gate = engine.model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        gate.copy_(gate[torch.tensor([1, 2, 3, 0])])  # every expert's row goes to its neighbour
    after = engine.routing(batch)
    assert torch.equal(after[0], before[0])
    moved = (before[1] - 1) % 4
    assert torch.equal(after[1].sort(-1).values, moved.sort(-1).values)
    by_hand = sum(len({*b} - {*a}) for b, a in zip(before[1].tolist(), after[1].tolist(), strict=True)) / 52
    assert drift(before, after) == [0, pytest.approx(by_hand)]
    assert by_hand > 0.2


def test_an_update_moves_experts(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    from seqrl.config.schema import OptimConfig
    from seqrl.training.objective import Likelihood

    engine = make_engine(make_model(), optim=OptimConfig(lr=3e-2))
    before = engine.routing(batch)
    engine.update(batch, Likelihood())
    assert sum(drift(before, engine.routing(batch))) > 0


def test_a_dense_model_has_none(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    model = make_model("qwen3")
    assert expert_layers(model) == [] and make_engine(model).routing(batch) == []


def test_gradient_checkpointing_and_each_experts_implementation(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    """As models are loaded for training: checkpointed, with our own experts; each layer is seen once."""
    from seqrl.training import experts

    experts.register()
    plain = make_engine(make_model()).routing(batch)
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in ("sorted", "eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        assert drift(plain, make_engine(model).routing(batch)) == [0, 0], name


def test_other_mixtures_of_experts(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    """With a dense layer among them, and a shared expert, which is not routed to."""
    sizes = {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}
    engine = make_engine(make_model("qwen2_moe", **sizes))
    (only,) = engine.routing(batch)
    assert only.shape == (26, 2) and int(only.max()) < 4


def test_it_leaves_the_model_as_it_was(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    engine = make_engine(make_model())
    weights, logprobs = copy.deepcopy(engine.model.state_dict()), engine.logprobs(batch)
    engine.routing(batch)
    assert not any(module._forward_pre_hooks for module in engine.model.modules())
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert engine.model.training and torch.equal(engine.logprobs(batch), logprobs)
    assert all(torch.equal(x, weights[name]) for name, x in engine.model.state_dict().items())


def test_tokens_that_were_rejected_do_not_count(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    engine = make_engine(make_model())
    mask = batch.response_mask.clone()
    mask[batch.offsets[3] :] = False
    fewer = engine.routing(replace(batch, response_mask=mask))
    everyone = engine.routing(batch.select([0, 1, 2]))
    assert fewer[0].shape == (10, 2)
    assert all(torch.equal(x, y) for x, y in zip(fewer, everyone, strict=True))
