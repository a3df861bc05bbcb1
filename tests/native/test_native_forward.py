"""The native forward against transformers' own: hidden states and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_models import KINDS, VOCABULARY, build_native
from torch import Tensor, nn

from seqrl.kernels import fits, self_attention, turned
from seqrl.native.forward import hidden_states
from seqrl.native.weights import Layer, read_weights, why_unreadable
from seqrl.training.packing import Layout, padded_attention
from seqrl.types import to_offsets

LENGTHS = [7, 20, 1, 33]


def tokens_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(VOCABULARY, (sum(lengths),), generator=generator).split(lengths))


def native(model: Any, sequences: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, H], the sequences in one flat row."""
    layout = Layout.of(to_offsets(torch.tensor([len(tokens) for tokens in sequences])))
    w = read_weights(model, dtype, length=layout.longest)

    def attention(index: int, layer: Layer, qkv: Tensor) -> Tensor:
        if fits(w.embedding.dtype, dtype, qkv.device, w.turn.size // 2):
            return self_attention(qkv, layer.q_norm, layer.k_norm, layout.positions, w.turn, layout.spans)
        heads = turned(qkv, layout.positions, w.turn, layer.q_norm, layer.k_norm)
        q, k, v = (x.transpose(0, 1)[None] for x in heads)
        return padded_attention(q, k, v, layout)[0].flatten(1)

    return hidden_states(w, torch.cat(sequences), attention)


def by_transformers(model: Any, sequences: list[Tensor]) -> Tensor:
    return torch.cat(
        [model.model(tokens[None], use_cache=False).last_hidden_state[0] for tokens in sequences]
    )


def learnt(model: Any, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The hidden states, and the gradient of each parameter below the head for a loss of them."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    toward = torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden.dtype)
    (hidden * toward).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name != "lm_head.weight"}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing
    return hidden.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def check(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], error: float
) -> None:
    pairs = {name: (ours[1][name], right) for name, right in theirs[1].items()}
    for name, (our, right) in {"hidden states": (ours[0], theirs[0]), **pairs}.items():
        assert right.norm() > 0, name
        assert (our.double() - right.double()).norm() < error * right.double().norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_gradients_are_transformers_own(in_c: bool, kind: str) -> None:
    model, sequences = build_native(kind), tokens_of(LENGTHS)
    assert why_unreadable(model) is None
    ours = learnt(model, native(model, sequences))
    check(ours, learnt(model, by_transformers(model, sequences)), 2e-5)
    with torch.no_grad():
        torch.testing.assert_close(native(model, sequences), ours[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe, one layer dense"])
def test_layers_run_again_give_the_same_gradient(in_c: bool, kind: str) -> None:
    model, sequences = build_native(kind), tokens_of(LENGTHS)
    kept = learnt(model, native(model, sequences))
    model.gradient_checkpointing_enable()
    assert read_weights(model, torch.float32, length=33).checkpointing
    again = learnt(model, native(model, sequences))
    check(again, kept, 1e-6)
    model.eval()
    assert not read_weights(model, torch.float32, length=33).checkpointing


@pytest.mark.parametrize("kind", ["qwen2, tied", "qwen3", "qwen3_moe, 64 experts"])
def test_float64(kind: str) -> None:
    """By torch's own operations. Transformers' norms and angles are float32 whatever the model is."""
    model, sequences = build_native(kind).double(), tokens_of(LENGTHS)
    ours = learnt(model, native(model, sequences, torch.float64))
    assert ours[0].dtype == torch.float64
    check(ours, learnt(model, by_transformers(model, sequences)), 1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_products(in_c: bool, weights: torch.dtype) -> None:
    """Near the same model in float32, within one part in 20; gradients in the type of the weights."""
    model, sequences = build_native("qwen3").to(weights), tokens_of(LENGTHS)
    rough = learnt(model, native(model, sequences, torch.bfloat16))
    assert rough[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in rough[1].values()} == {weights}
    exact = learnt(model.float(), native(model, sequences))
    check(rough, exact, 0.05)


def test_one_sequence_does_not_see_the_other(in_c: bool) -> None:
    model = build_native("qwen3")
    one, two, three = tokens_of([9, 5, 12])
    with torch.no_grad():
        before, after = native(model, [one, two, three]), native(model, [one, two.flip(0), three])
    assert torch.equal(before[:9], after[:9]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[9:14], after[9:14])


# What the native forward must not stand in for.


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapted(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.lora_A = nn.Linear(4, 4)


def replaced_layer(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.__class__ = Own


def replaced_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda x: x


def several_types(model: Any) -> None:
    model.model.norm.to(torch.bfloat16)


def subclass(model: Any) -> None:
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapted, "parameter model.layers.1.self_attn.q_proj.lora_A.weight"),
        (replaced_layer, "another forward on model.layers.0.self_attn.o_proj"),
        (replaced_forward, "another forward on model.layers.1.mlp"),
        (several_types, "parameters of several types"),
        (subclass, "model type qwen3 (Mine)"),
    ],
)
def test_a_changed_model_is_not_read(change: Any, reason: str) -> None:
    model = build_native("qwen3")
    assert why_unreadable(model) is None
    change(model)
    told = why_unreadable(model)
    assert told is not None and reason in told


@pytest.mark.parametrize("hook", HOOKS)
def test_a_model_with_hooks_is_not_read_while_it_has_them(hook: str) -> None:
    model = build_native("qwen3")
    for module, name in ((model, "the model"), (model.model.layers[0].mlp, "model.layers.0.mlp")):
        handle = getattr(module, hook)(lambda *_: None)
        told = why_unreadable(model)
        assert told is not None and told.endswith(f"hook or another forward on {name}")
        handle.remove()
        assert why_unreadable(model) is None


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "activation gelu"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding-window",
        ),
        ("qwen3_moe, 64 experts", {"use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope type dynamic",
        ),
    ],
)
def test_other_settings_are_not_read(kind: str, changes: dict[str, Any], reason: str) -> None:
    told = why_unreadable(build_native(kind, **changes))
    assert told is not None and reason in told


def test_another_architecture_is_not_read() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert why_unreadable(GPTNeoXForCausalLM(config)) == "model type gpt_neox (GPTNeoXForCausalLM)"


def test_gradient_checkpointing_leaves_a_model_native() -> None:
    """Transformers hangs a hook on the embedding, which training all weights does not need."""
    model = build_native("qwen3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.get_input_embeddings()._forward_hooks
    assert why_unreadable(model) is None
