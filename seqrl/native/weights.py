"""The weights of a Llama, Qwen2, Qwen3 or Qwen3-MoE as the native forward reads them from the module.

They are the trainer's own tensors, by reference, but for what is made at each call: projections of the same
input are joined into one matrix, and matrices are cast where the compute type differs from theirs. Norms,
embedding and residual stream keep the type of the weights, as under autocast. Gradients flow back through
both into the module's parameters. Without gradient they can be made in one place at every call (`Copies`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqrl.kernels import (
    Matrices,
    Matrix,
    Reordered,
    Strips,
    Tiles,
    Turn,
    expert_matrices,
    gated,
    laid_out,
    laid_out_experts,
    linear,
    matrix,
)
from seqrl.native.experts import Experts

MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3", "qwen3_moe"})
_READ = re.compile(
    r"(model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm"
    r"|self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|gate_proj|up_proj|down_proj)))|lm_head)\.(weight|bias)"
    r"|model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)"
)
"""The parameters that are read. A model with any other (adapters, sinks) is not a native one."""


class Linear(NamedTuple):
    weight: Matrix
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Dense(NamedTuple):
    """A gated feed-forward layer."""

    gate_up: Linear
    down: Linear

    @property
    def width(self) -> int:
        """Of what lies between the two."""
        down = self.down.weight
        assert not isinstance(down, Reordered), "laid out, its shape is oneDNN's"
        return down.ins if isinstance(down, Tiles | Strips) else down.shape[1]

    def __call__(self, y: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(y)))


class Norm(NamedTuple):
    weight: Tensor
    """[H]"""
    eps: float


class Layer(NamedTuple):
    attention_norm: Norm
    qkv: Linear
    q_norm: Tensor | None
    """[D], of each head."""
    k_norm: Tensor | None
    out: Linear
    mlp_norm: Norm
    mlp: Dense | Experts


@dataclass(frozen=True)
class Weights:
    dtype: torch.dtype
    """Of the matrix products."""
    embedding: Tensor
    layers: list[Layer]
    norm: Norm
    lm_head: Linear
    turn: Turn
    """How projections become queries and keys."""
    vocabulary: int
    checkpointing: bool
    """Layers are run again for the gradient instead of keeping what they made."""


class Copies:
    """What readings make, one after the other of the same model with the same settings: each fills the
    tensors of the first, where a CUDA graph looks for them. Without gradient."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._taken = 0

    def begin(self) -> None:
        """Another reading."""
        self._taken = 0

    def joined(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """`parts` one below the other."""
        if self._taken == len(self._kept):
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            self._kept.append(parts[0].new_empty(shape, dtype=dtype))
        self._taken += 1
        return torch.cat(list(parts), out=self._kept[self._taken - 1])


def why_unreadable(model: Any) -> str | None:
    """Why the native forward cannot stand in for `model`, in a few words; None where it can."""
    config = model.config
    if config.model_type not in MODEL_TYPES or not type(model).__module__.startswith("transformers."):
        return f"model type {config.model_type} ({type(model).__name__})"
    changed = next((name for name, module in model.named_modules() if _is_changed(module)), None)
    if changed is not None:
        return f"a hook or another forward on {changed or 'the model'}"
    unread = next((name for name, _ in model.named_parameters() if not _READ.fullmatch(name)), None)
    if unread is not None:
        return f"parameter {unread}"
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        return "parameters of several types"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "sliding-window layers"
    if config.model_type == "qwen3_moe" and config.sliding_window is not None:
        return "sliding-window layers"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    rotary = model.model.rotary_emb
    if rotary.rope_type in ("dynamic", "longrope"):  # its angles change with the length of the batch
        return f"rope type {rotary.rope_type}"
    if 2 * rotary.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        return "rotary embedding over a part of the head"
    return None


def _is_changed(module: Any) -> bool:
    """Whether somebody has this module do something else than its class says."""
    hooks = [
        hook
        for kind in (module._forward_hooks, module._forward_pre_hooks)
        for hook in (*kind.values(), *module._backward_hooks.values(), *module._backward_pre_hooks.values())
        # Transformers' own, under gradient checkpointing; weights that are trained do not need it.
        if getattr(hook, "__name__", "") != "make_inputs_require_grads"
    ]
    foreign = not type(module).__module__.startswith(("transformers.", "torch.nn."))
    return bool(hooks) or foreign or "forward" in vars(module)


def read_weights(
    model: Any,
    dtype: torch.dtype,
    *,
    length: int,
    keep: bool = False,
    copies: Copies | None = None,
    asked: list[Tensor] | None = None,
) -> Weights:
    """The weights of `model` as they are now, matrices in `dtype`, for positions below `length`.

    `keep` lays them out for many products without gradient; or what has to be made for them lies in `copies`.
    `asked` takes the experts that a forward chooses, layer by layer.
    """
    if copies is not None:
        copies.begin()

    def linear_of(*modules: Any) -> Linear:
        biases = [module.bias for module in modules if getattr(module, "bias", None) is not None]
        return Linear(matrix_of(*(module.weight for module in modules)), joined(biases) if biases else None)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) == 1 and tensors[0].dtype == dtype:
            return tensors[0]
        if copies is not None:
            return copies.joined(tensors, dtype)
        return torch.cat([tensor.to(dtype) for tensor in tensors])

    def matrix_of(*sources: Tensor) -> Matrix:
        if copies is not None:
            return joined(sources)
        weight = matrix(*sources, dtype=dtype)
        return laid_out(weight) if keep else weight

    def experts_of(*sources: Tensor) -> Sequence[Matrices]:
        if copies is not None:
            return [joined([source]) for source in sources]
        layer = [expert_matrices(source, dtype=dtype) for source in sources]
        return laid_out_experts(*layer) if keep else layer

    def norm(module: Any) -> Norm:
        return Norm(module.weight, module.variance_epsilon)

    def mlp(module: Any) -> Dense | Experts:
        if not hasattr(module, "experts"):
            return Dense(linear_of(module.gate_proj, module.up_proj), linear_of(module.down_proj))
        gate_up, down = experts_of(module.experts.gate_up_proj, module.experts.down_proj)
        return Experts(
            router=matrix_of(module.gate.weight),
            gate_up=gate_up,
            down=down,
            top_k=module.gate.top_k,
            normalise=module.gate.norm_topk_prob,
            asked=asked,
        )

    def layer(module: Any) -> Layer:
        attention = module.self_attn
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return Layer(
            attention_norm=norm(module.input_layernorm),
            qkv=linear_of(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            out=linear_of(attention.o_proj),
            mlp_norm=norm(module.post_attention_layernorm),
            mlp=mlp(module.mlp),
        )

    inner = model.model
    return Weights(
        dtype=dtype,
        embedding=inner.embed_tokens.weight,
        layers=[layer(module) for module in inner.layers],
        norm=norm(inner.norm),
        lm_head=linear_of(model.lm_head),
        turn=_turn(model, length, copies),
        vocabulary=model.lm_head.weight.shape[0],
        checkpointing=bool(model.is_gradient_checkpointing and model.training),
    )


def _turn(model: Any, length: int, copies: Copies | None) -> Turn:
    config, attention, rotary = model.config, model.model.layers[0].self_attn, model.model.rotary_emb
    wide = torch.promote_types(model.dtype, torch.float32)
    positions = torch.arange(length, device=rotary.inv_freq.device)
    cos, sin = rotary(torch.empty(1, dtype=wide, device=positions.device), positions[None])
    half = attention.head_dim // 2
    cos, sin = (table[0, :, :half].contiguous() for table in (cos, sin))
    if copies is not None:
        cos, sin = (copies.joined([table], table.dtype) for table in (cos, sin))
    q_norm = getattr(attention, "q_norm", None)
    return Turn(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        size=attention.head_dim,
        cos=cos,
        sin=sin,
        eps=0.0 if q_norm is None else q_norm.variance_epsilon,
    )
