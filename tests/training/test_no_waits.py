"""A step on a GPU is queued without the host waiting once: here on a device that has no numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seqrl.algos.losses import LOSSES, Surrogate
from seqrl.config.schema import ActorConfig, OptimConfig, PolicyLossConfig
from seqrl.training import experts
from seqrl.training.objective import Likelihood, PolicyObjective
from seqrl.types import Batch

LENGTHS = [(3, 9), (3, 1), (2, 0), (2, 14), (4, 7), (4, 6)]


def objective(loss: str = "gspo", **actor: Any) -> PolicyObjective:
    settings = PolicyLossConfig(loss, dro_beta=0.1)
    return PolicyObjective(ActorConfig(policy_loss=settings, clip_ratio=0.2, **actor), 16)


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """The two sequences of a group have one prompt."""
    batch = make_batch(LENGTHS)
    tokens, starts = batch.tokens.clone(), batch.offsets.tolist()
    for i in range(0, len(batch), 2):
        prompt = LENGTHS[i][0]
        tokens[starts[i + 1] :][:prompt] = tokens[starts[i] :][:prompt]
    return replace(batch, tokens=tokens, weights=batch.response_mask.float())


@pytest.fixture
def engine(make_model: Callable[..., Any], make_engine: Callable[..., Any]) -> Callable[..., Any]:
    """On the unseen device, weights in float32 and products in bfloat16; a mini-batch is several
    micro-batches."""
    experts.register()

    def make(family: str = "qwen3", *, checkpointing: bool = False, **changed: Any) -> Any:
        model = make_model(family).to("meta")
        if family.endswith("moe"):
            model.set_experts_implementation(experts.EXPERTS_NAME)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return make_engine(model, max_tokens=40, **changed)

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_a_whole_optimizer_step(
    unseen: Any, engine: Callable[..., Any], batch: Batch, family: str, checkpointing: bool
) -> None:
    training = engine(family, checkpointing=checkpointing, grad_clip=1.0, with_reference=True)
    goals = [
        objective(use_kl_loss=True, kl_loss_type="low_var_kl", entropy_coeff=0.01),
        objective(use_kl_loss=True, kl_loss_type="full"),
        Likelihood(),
    ]
    for steps, goal in enumerate(goals, start=1):
        with unseen:
            update = training.update(batch, goal)
        assert update.norm.shape == () and update.norm.device.type == "meta"
        assert update.diagnostics.entropy.shape == (int(batch.response_mask.sum()),)
        assert training.steps_done == update.step == steps
        with pytest.raises(RuntimeError, match="cannot be called on meta"):
            _ = update.grad_norm
    assert unseen.sent > 20, "and all that went to the device was seen to"
    assert {state["step"].device.type for state in training.optimizer.state.values()} == {"meta"}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss(unseen: Any, engine: Callable[..., Any], batch: Batch, loss: str) -> None:
    training = engine()
    with unseen:
        training.update(batch, objective(loss))


def test_prompts_that_nobody_shares(unseen: Any, engine: Callable[..., Any], batch: Batch) -> None:
    training = engine()
    with unseen:
        training.update(replace(batch, group=torch.arange(len(batch))), objective())


def test_a_look_at_a_number_is_found(
    unseen: Any, engine: Callable[..., Any], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would show nothing."""

    def looks(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, offsets: Tensor) -> Surrogate:
        never = torch.zeros_like(logprobs, dtype=torch.bool)
        return Surrogate(-advantages * logprobs / float(offsets[-1]), never, never, never)

    monkeypatch.setitem(LOSSES, "gpg", looks)
    with pytest.raises(RuntimeError, match="cannot be called on meta"):
        engine().update(batch, objective("gpg"))


def test_an_optimizer_that_cannot_decide_for_itself_is_asked(
    unseen: Any, engine: Callable[..., Any], batch: Batch
) -> None:
    training = engine(optim=OptimConfig(lr=1e-3, override_optimizer_config={"fused": False}))
    with pytest.raises(RuntimeError, match="cannot be called on meta"):
        training.update(batch, objective())
