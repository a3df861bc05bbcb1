"""One optimizer step of the engine on a real model: what changes its gradient and what must not."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from seqrl.config.schema import ActorConfig, OptimConfig, PolicyLossConfig
from seqrl.training.base import fetched
from seqrl.training.objective import Likelihood, Objective, PolicyObjective
from seqrl.types import Batch

GSPO = PolicyObjective(
    ActorConfig(policy_loss=PolicyLossConfig("gspo"), clip_ratio=0.2, entropy_coeff=0.01), 16
)


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., Batch]) -> Batch:
    return make_batch([(3, 9), (5, 1), (2, 0), (4, 14)])


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def gradients(engine: Any, batch: Batch, objective: Objective = GSPO) -> dict[str, torch.Tensor]:
    """Read where the engine would step, which it then does not."""
    seen: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        seen.update((name, p.grad.clone()) for name, p in engine.model.named_parameters())

    engine.optimizer.register_step_pre_hook(look)
    engine.update(batch, objective)
    return seen


def assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_checkpointing_changes_no_gradient(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    plain, checkpointed = make_model(), make_model()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    checkpointed.model.layers[0].mlp.register_forward_pre_hook(count)
    ours = gradients(make_engine(checkpointed), batch)
    assert calls == 2, "forward, and again in the backward"
    assert_alike(ours, gradients(make_engine(plain), batch), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_each_way_to_compute_experts_gives_the_same_gradient(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch, implementation: str
) -> None:
    found = []
    for name in ("eager", implementation):
        model = make_model()
        model.set_experts_implementation(name)
        found.append(gradients(make_engine(model), batch))
    assert_alike(*found, rtol=1e-3, atol=1e-5)


def test_bfloat16_gradients_are_close_and_weights_stay_float32(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    exact = gradients(make_engine(make_model("qwen3")), batch, Likelihood())
    engine = make_engine(make_model("qwen3"), compute_dtype=torch.bfloat16)
    rough = gradients(engine, batch, Likelihood())
    for name in exact:
        difference = (rough[name] - exact[name]).norm() / exact[name].norm()
        assert 0 < difference < 0.15, name
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_the_reported_norm_is_from_before_clipping_and_the_gradient_is_clipped(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    full = gradients(make_engine(make_model()), batch)
    norm = math.sqrt(sum(float(g.square().sum()) for g in full.values()))
    bound = make_engine(make_model(), grad_clip=norm / 4)
    assert bound.update(batch, GSPO).grad_norm == pytest.approx(norm)
    share = 1 - bound.optimizer.defaults["betas"][0]
    taken = {name: bound.optimizer.state[p]["exp_avg"] / share for name, p in bound.model.named_parameters()}
    assert_alike(taken, {name: g / 4 for name, g in full.items()}, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_not_finite_skips_the_step_and_the_next_goes_on(
    make_model: Callable[..., Any],
    make_engine: Callable[..., Any],
    batch: Batch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(make_model())
    before = weights(engine)
    poisoned = replace(batch, advantages=torch.where(batch.response_mask, torch.nan, 0.0))
    with caplog.at_level(logging.WARNING):
        (update,) = fetched([engine.update(poisoned, GSPO)])
    assert not math.isfinite(update.grad_norm)
    assert caplog.messages == ["optimizer step 1 skipped: gradient norm nan"]
    assert_alike(weights(engine), before, rtol=0, atol=0)
    assert engine.steps_done == 1, "the schedule goes on all the same"
    assert math.isfinite(engine.update(batch, GSPO).grad_norm)
    assert all(w.isfinite().all() for w in weights(engine).values())
    assert any((w != before[name]).any() for name, w in weights(engine).items())


def test_the_learning_rate_follows_the_schedule_over_updates(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    optim = OptimConfig(lr=1e-3, lr_scheduler_type="linear", lr_warmup_steps=1)
    engine = make_engine(make_model("llama"), optim=optim, total_steps=5)
    rates = [engine.update(batch, Likelihood()).lr for _ in range(5)]
    assert rates == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_supervised_training_learns_an_answer_by_heart(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    engine = make_engine(make_model("llama"), optim=OptimConfig(lr=1e-2), total_steps=60)
    losses = [float(engine.update(batch, Likelihood()).diagnostics.loss.sum()) for _ in range(60)]
    assert losses[0] > 3 and losses[-1] < 0.1
    first = float(-engine.logprobs(batch)[batch.response_mask].mean())
    assert first < 0.1, "the loss is the mean negative log-likelihood of the answer's tokens"


def test_a_restored_engine_goes_on_bit_for_bit(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    settings = {"optim": OptimConfig(lr=1e-2, lr_scheduler_type="cosine"), "total_steps": 6}
    straight = make_engine(make_model(), **settings)
    for _ in range(3):
        straight.update(batch, GSPO)
    state = copy.deepcopy(straight.state())
    for _ in range(3):
        last = straight.update(batch, GSPO)

    restored = make_engine(make_model(), **settings)
    restored.update(batch, Likelihood())
    restored.load_state(state)
    assert restored.steps_done == 3
    for _ in range(3):
        other = restored.update(batch, GSPO)
    assert (other.grad_norm, other.lr) == (last.grad_norm, last.lr)
    assert_alike(weights(restored), weights(straight), rtol=0, atol=0)


def test_the_state_is_enough_for_json_and_safetensors(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    import json

    engine = make_engine(make_model())
    engine.update(batch, GSPO)
    state = engine.state()
    assert json.loads(json.dumps(state.extra)) == {"optimizer_steps": 1}
    assert all(
        isinstance(value, torch.Tensor) for value in [*state.model.values(), *state.optimizer.values()]
    )


def test_a_groups_prompt_counts_once_where_its_responses_read_it_in_place(
    make_model: Callable[..., Any], make_engine: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([(6, 4), (6, 4)])
    calls: list[int] = []

    class Counted(Likelihood):
        def __call__(self, logprobs: Any, entropy: Any, part: Batch, *others: Any) -> Any:
            calls.append(len(part))
            return super().__call__(logprobs, entropy, part, *others)

    in_place = make_engine(make_model("qwen3", head_dim=32), max_tokens=14)
    in_place.update(batch, Counted())
    assert calls == [2], "6 + 4 + 4 tokens"
    side_by_side = make_engine(make_model("qwen3"), max_tokens=14)  # halves of heads fill no vector
    side_by_side.update(batch, Counted())
    assert calls == [2, 1, 1]
