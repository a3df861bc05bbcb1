"""The native mixture-of-experts layers in the form transformers calls, and where they send tokens.

Unlike transformers' own, the products follow autocast. Measured in docs/performance.md.

Shape legend: T tokens, k experts per token, P = T k pairs, E experts, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqrl.kernels import expert_matrices
from seqrl.native.experts import mixture

EXPERTS_NAME = "sorted"


def sorted_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over each token's experts.

    `hidden` [T, H], `chosen` [T, k] expert indices, `weights` [T, k] -> [T, H]. Experts with biases,
    another layout of weights or another gate go through transformers' `grouped_mm`.
    """
    from transformers.activations import SiLUActivation
    from transformers.integrations import moe

    gated_by_silu = (
        module.has_gate
        and type(module)._apply_gate is moe._default_apply_gate
        and isinstance(module.act_fn, SiLUActivation)
    )
    if module.has_bias or module.is_transposed or not gated_by_silu:
        return moe.grouped_mm_experts_forward(module, hidden, chosen, weights)
    gate_up, down = module.gate_up_proj, module.down_proj
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden = hidden.to(dtype)
    matrices = (expert_matrices(source, dtype=hidden.dtype) for source in (gate_up, down))
    return mixture(hidden, chosen, weights, *matrices)


def expert_layers(model: Any) -> list[Any]:
    """The modules of `model` that are told which experts a token goes to, in order; none in a dense model."""
    return [m for m in model.modules() if "top_k_index" in inspect.signature(m.forward).parameters]


def hooked_routing(layers: Sequence[Any], run: Callable[[], Any]) -> list[Tensor]:
    """The experts that `layers` send each token to while `run` calls their model, layer by layer: [T', k]."""
    chosen: list[Tensor] = []

    def take(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        chosen.append(named["top_k_index"] if "top_k_index" in named else arguments[1])

    hooks = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return chosen


def register() -> None:
    """Makes `sorted_experts` known to transformers as an experts implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, sorted_experts)
