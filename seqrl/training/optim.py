"""The optimizer: AdamW, its learning-rate schedule, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqrl.config.schema import OptimConfig
from seqrl.errors import UserError

STRETCH = 2**18
"""Numbers whose squares a CPU adds up one after the other. MKL does so with all it is given: on processors
of other makers the norm of 25 million float32 is then wrong by 5e-4, of 155 million by 7e-3."""


def make_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); norms and biases are not decayed.

    Raises UserError for a further argument that torch's AdamW does not take.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    arguments: dict[str, Any] = {"betas": tuple(config.betas), "fused": True}
    try:
        return torch.optim.AdamW(groups, lr=config.lr, **{**arguments, **config.override_optimizer_config})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optim.override_optimizer_config={config.override_optimizer_config}: torch.optim.AdamW refuses "
            f"it: {error}; remove what it does not take"
        ) from error


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """[], of all gradients together; by inner products, three times as fast on a CPU as torch's own norms."""
    flat = (p.grad.flatten() for p in parameters if p.grad is not None)
    wide = (grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in flat)
    stretches = (part for grad in wide for part in (grad.split(STRETCH) if grad.is_cpu else (grad,)))
    squares = [part.dot(part) for part in stretches]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def clipped_step(optimizer: torch.optim.Optimizer, norm: Tensor, most: float) -> None:
    """One step by gradients that are clipped as by `torch.nn.utils.clip_grad_norm_`; none where their `norm`
    [] is no finite number.

    A fused optimizer reads the gradients once for both, and decides on its device, as under torch's
    `GradScaler`; for another one the host has to ask.
    """
    if optimizer.defaults.get("fused"):
        divisor = ((norm + 1e-6) / most).clamp(min=1)
        told = {"grad_scale": divisor.float(), "found_inf": (~norm.isfinite()).float()}
        for name, value in told.items():
            setattr(optimizer, name, value)
        optimizer.step()
        for name in told:
            delattr(optimizer, name)
    elif norm.isfinite():
        clipped = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(clipped, most, norm)
        optimizer.step()


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (the first is 0) of `total_steps`."""
    warmup = config.lr_warmup_steps
    if warmup < 0:
        warmup = int(config.lr_warmup_steps_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if config.lr_scheduler_type == "cosine" else 1 - done
    least = config.lr * config.min_lr_ratio if config.min_lr is None else config.min_lr
    return least + (config.lr - least) * left


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `PARAMETER:FIELD` -> tensor, bit by bit."""
    return {
        f"{name}:{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. Raises UserError where a tensor fits no parameter."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, field = key.rpartition(":")
        if name not in parameters:
            raise UserError(f"the checkpoint's optimizer state holds {name}, which this model does not have")
        optimizer.state[parameters[name]][field] = value.to(parameters[name].device, copy=True)
