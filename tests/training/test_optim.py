"""AdamW, its schedule, and a state that goes on bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqrl.config.schema import OptimConfig
from seqrl.errors import UserError
from seqrl.training.optim import (
    clipped_step,
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    make_adamw,
    optimizer_tensors,
)


def schedule(total: int, **settings: object) -> list[float]:
    config = OptimConfig(lr=8.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8, 8, 8, 8]),
        ({"lr_warmup_steps": 2}, [4, 8, 8, 8]),
        ({"lr_warmup_steps_ratio": 0.5}, [4, 8, 8, 8]),
        ({"lr_warmup_steps": 0, "lr_warmup_steps_ratio": 0.5}, [8, 8, 8, 8]),
        ({"lr_warmup_steps": 9}, [8 / 9, 16 / 9, 24 / 9, 32 / 9]),
        ({"lr_scheduler_type": "linear"}, [8, 6, 4, 2]),
        ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.5}, [8, 7, 6, 5]),
        ({"lr_scheduler_type": "linear", "lr_warmup_steps": 2}, [4, 8, 8, 4]),
        ({"lr_scheduler_type": "cosine"}, [8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        (
            {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.25},
            [2 + 6 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)],
        ),
    ],
)
def test_schedules_by_value(settings: dict[str, object], expected: list[float]) -> None:
    assert schedule(4, **settings) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "end"), [("linear", 0.8), ("cosine", 0.8), ("constant", 8.0)])
def test_past_its_end_a_schedule_stays_at_its_end(kind: str, end: float) -> None:
    config = OptimConfig(lr=8.0, lr_scheduler_type=kind, min_lr_ratio=0.1)
    assert [learning_rate(config, step, 4) for step in (4, 5, 400)] == pytest.approx([end] * 3)


def make_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False)
    )


def test_matrices_are_decayed_and_norms_and_biases_are_not() -> None:
    net = make_net()
    net[2].weight.requires_grad_(False)
    optimizer = make_adamw(net, OptimConfig(lr=0.1, weight_decay=0.5, betas=[0.8, 0.95]))
    decayed, kept = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight)], "and frozen ones are not there at all"
    assert {id(p) for p in kept["params"]} == {id(net[0].bias), id(net[1].weight), id(net[1].bias)}
    assert decayed["betas"] == kept["betas"] == (0.8, 0.95)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), before["0.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(net[0].bias, before["0.bias"]) and torch.equal(net[1].weight, before["1.weight"])


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        loss = net(torch.randn(5, 3, generator=generator)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_restored_it_goes_on_bit_for_bit() -> None:
    config = OptimConfig(lr=0.01)
    net = make_net()
    optimizer = make_adamw(net, config)
    steps(net, optimizer, range(3))
    saved = {name: value.clone() for name, value in optimizer_tensors(net, optimizer).items()}
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    assert set(saved) == {
        f"{name}:{field}" for name in weights for field in ("step", "exp_avg", "exp_avg_sq")
    }
    steps(net, optimizer, range(3, 6))

    other = make_net()
    other_optimizer = make_adamw(other, config)
    steps(other, other_optimizer, range(50, 52))  # a state of its own, to be overwritten
    other.load_state_dict(weights)
    load_optimizer_tensors(other, other_optimizer, saved)
    assert all(torch.equal(saved[k], v) for k, v in optimizer_tensors(other, other_optimizer).items())
    steps(other, other_optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert saved["0.weight:step"] == 3, "the tensors it was given are left alone"


def test_a_state_of_another_model_is_refused() -> None:
    net = make_net()
    with pytest.raises(UserError, match=r"optimizer state holds 7\.weight"):
        load_optimizer_tensors(net, make_adamw(net, OptimConfig()), {"7.weight:exp_avg": torch.zeros(1)})


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_skipped_leaves_no_trace(fused: bool) -> None:
    config = OptimConfig(lr=0.01, override_optimizer_config={"fused": fused})
    ends = []
    for told in ([False, False], [True, False, True, True, False]):
        net = make_net()
        optimizer = make_adamw(net, config)
        for skipped in told:
            generator = torch.Generator().manual_seed(sum(not s for s in told))
            net(torch.randn(5, 3, generator=generator)).square().sum().backward()
            if skipped:
                net[0].weight.grad[0, 0] = torch.nan
            clipped_step(optimizer, gradient_norm(net.parameters()), 1.0)
            optimizer.zero_grad()
        ends.append({**net.state_dict(), **optimizer_tensors(net, optimizer)})
    assert ends[0]["0.weight:step"] == 2
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("most", [1e-2, 1e6])
def test_a_step_is_by_gradients_clipped_as_by_torch(dtype: torch.dtype, most: float, fused: bool) -> None:
    """Adam is all but blind to the size of gradients: what it keeps of them is compared."""
    config = OptimConfig(lr=0.01, override_optimizer_config={"fused": fused})

    def after(step: Callable[[Any, Any], Any]) -> list[Tensor]:
        net = make_net().to(dtype)
        optimizer = make_adamw(net, config)
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        net[:2](inputs).square().sum().backward()  # the last layer has no gradient
        norm = step(net, optimizer)
        kept = optimizer_tensors(net, optimizer)
        assert len(kept) == 4 * 3
        return [norm, *(kept[name] for name in sorted(kept)), *net.parameters()]

    def ours(net: Any, optimizer: Any) -> Tensor:
        norm = gradient_norm(net.parameters())
        clipped_step(optimizer, norm, most)
        return norm

    def theirs(net: Any, optimizer: Any) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), most)
        optimizer.step()
        return norm

    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(after(ours), after(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0, check_dtype=False)


def test_the_norm_of_many_numbers_is_exact_and_of_none_is_zero() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1000, 1536)) for _ in range(3)]
    assert gradient_norm(parameters) == 0
    grad = torch.randn(1000, 1536, generator=torch.Generator().manual_seed(1))
    parameters[0].grad, parameters[1].grad = grad, grad.clone()
    exact = math.sqrt(2 * float(grad.double().square().sum()))
    assert float(gradient_norm(parameters)) == pytest.approx(exact, rel=3e-6)
    grad[0, 0] = torch.inf
    assert not math.isfinite(gradient_norm(parameters))
