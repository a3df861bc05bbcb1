"""A layer's blocks in one call each (native/blocks.py), against their operations one by one: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import test_recorded
import torch
from native_models import KINDS
from test_recorded import build_native, make_batch, said_of, slopes
from torch import Tensor

import seqrl.native.forward
from seqrl.kernels import Spans, has_tiles
from seqrl.native import blocks
from seqrl.native.blocks import Causal
from seqrl.native.weights import read_weights

pytestmark = pytest.mark.skipif(
    not has_tiles(torch.bfloat16, torch.device("cpu")), reason="no matrix unit here"
)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The C functions that blocks have called."""
    names: list[str] = []

    def call(name: str, *arguments: Any) -> None:
        names.append(name)
        original(name, *arguments)

    original = blocks.call
    monkeypatch.setattr(blocks, "call", call)
    return names


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqrl.native.forward, "attends", lambda *_: False)
    monkeypatch.setattr(seqrl.native.forward, "feeds", lambda *_: False)


def learnt(model: Any, none_of: list[int], **asked: Any) -> list[Tensor | None]:
    """Log-probs with and without autograd, and the gradients of the weights."""
    batch = make_batch()
    with torch.no_grad():
        plain = said_of(model, batch, torch.bfloat16).logprobs
    said = said_of(model, batch, torch.bfloat16, **asked)
    model.zero_grad(set_to_none=True)
    said.logprobs.backward(slopes(batch, none_of))
    return [plain, said.logprobs.detach(), *(parameter.grad for parameter in model.parameters())]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(b is None if a is None else b is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("asked", [{}, {"sum_pi_squared": True}], ids=["recorded", "under autograd"])
@pytest.mark.parametrize("none_of", [[], [0, 3, 7]], ids=["all", "some"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"qwen3, narrow heads"}))
def test_blocks_say_what_their_operations_say(
    kind: str,
    stream: torch.dtype,
    none_of: list[int],
    asked: dict[str, bool],
    threads: int,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_native(kind).to(stream)
    ours = learnt(model, none_of, **asked)
    dense = sum(hasattr(layer.mlp, "down_proj") for layer in model.model.layers)
    assert calls.count("attention_block") == 2 * 2, "each layer, without and with a gradient"
    assert calls.count("attention_block_backward") == 2
    assert calls.count("gated_block") == 2 * dense and calls.count("gated_block_backward") == dense
    one_by_one(monkeypatch)
    assert same(ours, learnt(model, none_of, **asked))
    assert len(calls) == 6 + 3 * dense


def test_many_tokens_go_through_in_chunks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are 1,095, and go through in chunks of 256, by one thread or by two; fewer go all at once."""
    monkeypatch.setattr(test_recorded, "RESPONSES", [[150, 170, 160], [190, 141, 160], [112]])
    model = build_native("llama with biases")
    ours = learnt(model, [1])
    one_by_one(monkeypatch)
    assert same(ours, learnt(model, [1]))


def test_layers_that_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_native("llama with biases")
    kept = learnt(model, [0, 3, 7])
    model.gradient_checkpointing_enable()
    again = learnt(model, [0, 3, 7])
    assert same(again, kept)
    one_by_one(monkeypatch)
    assert same(again, learnt(model, [0, 3, 7]))


def test_weights_that_are_not_trained_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix, of parts of a joined one, of norms, of biases."""
    model = build_native("llama with biases")
    for name, parameter in model.named_parameters():
        frozen = ("0.mlp.down_proj", "1.self_attn.k_proj", "0.input_layernorm", "0.self_attn.q_proj.bias")
        parameter.requires_grad_(not any(part in name for part in frozen))
    ours = learnt(model, [2])
    assert sum(x is None for x in ours) == 2 + 2 + 1 + 1
    one_by_one(monkeypatch)
    assert same(ours, learnt(model, [2]))


def test_a_matrix_whose_rows_do_not_lie_side_by_side(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_native("qwen3")
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().t().contiguous().t())
    ours = learnt(model, [])
    assert calls.count("gated_block_backward") == 1, "that of the other layer"
    one_by_one(monkeypatch)
    assert same(ours, learnt(model, []))


def test_a_span_behind_the_last_token_is_refused() -> None:
    model = build_native("qwen3")
    w = read_weights(model, torch.bfloat16, length=16)
    long = torch.tensor([9])
    spans = Spans(shared=0 * long, shared_columns=0 * long, own=0 * long, own_columns=long)
    with pytest.raises(AssertionError, match="behind the last token"):
        Causal(torch.arange(8), w.turn, spans)
