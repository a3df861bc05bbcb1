"""Native decoding and its fallback, against the plain transformers forward and `generate`."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from rollout_models import EOS, NATIVE, VOCAB, FakeTokenizer, build, forward_logits, make_prompts

from seqrl.errors import UserError
from seqrl.kernels import library
from seqrl.rollout.base import make_engine
from seqrl.rollout.native import CachedDecoder, NativeEngine
from seqrl.rollout.paged import PagedDecoder
from seqrl.rollout.transformers_engine import TransformersEngine
from seqrl.types import Rollout, SamplingParams

LENGTHS = [5, 9, 3, 9, 1, 14]
BOTH = ["qwen3", "qwen3/32"]  # one for each decoder


def rollouts(
    model: Any, sampling: SamplingParams, lengths: list[int] = LENGTHS, **more: Any
) -> list[Rollout]:
    dtype = more.pop("dtype", torch.float32)
    engine = make_engine(model, FakeTokenizer(), max_num_seqs=more.pop("max_num_seqs", 64), dtype=dtype)
    if isinstance(engine, NativeEngine):
        wide = model.model.layers[0].self_attn.head_dim % 32 == 0 and library() is not None
        assert isinstance(engine._decoder(1, 1, 1, 1), CachedDecoder if wide else PagedDecoder)
    return engine.generate(more.pop("prompts", make_prompts(lengths)), sampling, seed=3, policy_version=7)


def worst_difference(model: Any, made: list[Rollout], temperature: float = 1.0) -> float:
    """Largest distance of a rollout log-prob from the log-softmax of the plain forward."""
    worst = 0.0
    for r in made:
        expected = (forward_logits(model, r.prompt, r.tokens) / temperature).log_softmax(-1)
        worst = max(worst, (expected.gather(-1, r.tokens[:, None])[:, 0] - r.logprobs).abs().max().item())
    return worst


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_native_logprobs_agree_with_the_training_forward(name: str, temperature: float) -> None:
    model = build(name)
    made = rollouts(model, SamplingParams(max_new_tokens=50, n=4, temperature=temperature))
    assert sum(len(r.tokens) for r in made) > 200
    assert worst_difference(model, made, temperature) < 1e-4


@pytest.mark.parametrize("name", BOTH)
def test_native_logprobs_agree_under_rope_scaling(name: str) -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
    }
    model = build(name, rope_parameters=scaling)
    assert worst_difference(model, rollouts(model, SamplingParams(max_new_tokens=60))) < 1e-4


@pytest.mark.parametrize("name", NATIVE)
def test_greedy_equals_transformers_generate(name: str) -> None:
    model = build(name)
    for r in rollouts(model, SamplingParams(max_new_tokens=20, temperature=0)):
        sequence = model.generate(
            torch.tensor([r.prompt.tokens]),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert r.tokens.tolist() == sequence[0, len(r.prompt.tokens) :].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "llama/64", "qwen3_moe/32", "gpt_neox"])
def test_a_response_does_not_depend_on_its_batch(name: str) -> None:
    model, sampling = build(name), SamplingParams(max_new_tokens=15, n=6)
    prompts = make_prompts(LENGTHS)
    together = rollouts(model, sampling, prompts=prompts)
    for max_num_seqs in (1, 4, 13):  # groups split, one group a wave, two groups a wave
        for a, b in zip(
            together, rollouts(model, sampling, prompts=prompts, max_num_seqs=max_num_seqs), strict=True
        ):
            assert a.tokens.tolist() == b.tokens.tolist()
    alone = rollouts(model, sampling, prompts=[prompts[2]])
    others = rollouts(model, sampling, prompts=[*make_prompts([2, 20, 7], seed=5), prompts[2]])
    fewer = rollouts(model, SamplingParams(max_new_tokens=15, n=2), prompts=[prompts[2]])
    expected = [r.tokens.tolist() for r in together[12:18]]
    assert [r.tokens.tolist() for r in alone] == expected
    assert [r.tokens.tolist() for r in others[18:]] == expected
    assert [r.tokens.tolist() for r in fewer] == expected[:2]
    assert len({tuple(tokens) for tokens in expected}) > 1


@pytest.mark.parametrize("name", BOTH)
def test_order_groups_texts_and_endings(name: str) -> None:
    model, limit = build(name), 25
    made = rollouts(model, SamplingParams(max_new_tokens=limit, n=3))
    assert [r.group for r in made] == [i for i in range(len(LENGTHS)) for _ in range(3)]
    assert [len(r.prompt.tokens) for r in made] == [length for length in LENGTHS for _ in range(3)]
    assert {r.finished for r in made} == {True, False}
    for r in made:
        assert r.policy_version == 7
        assert (r.tokens.dtype, r.logprobs.dtype) == (torch.int64, torch.float32)
        assert EOS not in r.tokens[:-1]
        assert r.finished == (r.tokens[-1] == EOS)
        assert r.finished or len(r.tokens) == limit
        assert r.text == " ".join(f"w{i}" for i in r.tokens if i != EOS)
        assert not r.logprobs.is_inference()


@pytest.mark.parametrize("name", BOTH)
def test_every_end_of_sequence_id_ends_a_response(name: str) -> None:
    model = build(name)
    model.generation_config.eos_token_id = [5, 7]
    model.config.eos_token_id = 9
    made = rollouts(model, SamplingParams(30, n=30))
    assert {int(r.tokens[-1]) for r in made if r.finished} == {5, 7, 9, EOS}
    for r in made:
        assert not set(r.tokens[:-1].tolist()) & {5, 7, 9, EOS}


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe/32"])
def test_restricted_logprobs_by_independent_computation(name: str) -> None:
    model, k = build(name), 5
    for r in rollouts(model, SamplingParams(max_new_tokens=15, n=3, temperature=0.8, top_k=k)):
        logits = forward_logits(model, r.prompt, r.tokens) / 0.8
        for step, token in enumerate(r.tokens.tolist()):
            best = logits[step].sort(descending=True).indices[:k].tolist()
            assert token in best
            expected = logits[step, token] - logits[step, best].logsumexp(0)
            assert r.logprobs[step].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_first_tokens_follow_the_models_distribution(name: str) -> None:
    model, draws = build(name), 4000
    made = rollouts(model, SamplingParams(max_new_tokens=1, n=draws), lengths=[6], max_num_seqs=draws)
    expected = forward_logits(model, made[0].prompt, made[0].tokens)[0].softmax(-1)
    counts = torch.bincount(torch.cat([r.tokens for r in made]), minlength=VOCAB)
    assert (counts / draws - expected).abs().sum() / 2 < 0.04  # total variation


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt_neox", {}, "model type gpt_neox"),
        ("gemma2", {}, "model type gemma2"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, "sliding"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}, "sliding"),
    ],
)
def test_other_architectures_fall_back_aloud(
    name: str, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(name, **changes)
    with caplog.at_level(logging.WARNING, logger="seqrl.rollout"):
        assert isinstance(
            make_engine(model, FakeTokenizer(), max_num_seqs=8, dtype=torch.float32), TransformersEngine
        )
    (message,) = [record.getMessage() for record in caplog.records]
    assert type(model).__name__ in message and reason in message
    assert worst_difference(model, rollouts(model, SamplingParams(max_new_tokens=30, n=2))) < 1e-4


def test_a_parameter_native_does_not_read_falls_back() -> None:
    model = build("qwen3")
    assert isinstance(make_engine(model, FakeTokenizer(), max_num_seqs=8, dtype=torch.float32), NativeEngine)
    model.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(4, 4)
    assert isinstance(
        make_engine(model, FakeTokenizer(), max_num_seqs=8, dtype=torch.float32), TransformersEngine
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe/32", "gpt_neox"])
def test_the_model_is_read_anew_and_left_as_it_was(name: str) -> None:
    model = build(name).train()
    model.gradient_checkpointing_enable()
    model.base_model.layers[0].eval()  # a mixture of flags
    next(model.parameters()).requires_grad_(False)

    def state() -> tuple[Any, ...]:
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
        )

    before = state()
    engine = make_engine(model, FakeTokenizer(), max_num_seqs=8, dtype=torch.float32)
    prompts, sampling = make_prompts(LENGTHS), SamplingParams(max_new_tokens=12, n=2)
    first = engine.generate(prompts, sampling, seed=3, policy_version=0)
    after = state()
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert worst_difference(model.eval(), first) < 1e-4

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = engine.generate(prompts, sampling, seed=3, policy_version=1)
    assert worst_difference(model, first) > 1e-2
    assert worst_difference(model, second) < 1e-4


@pytest.mark.parametrize("name", [*BOTH, "qwen3_moe", "qwen3_moe/32", "gpt_neox"])
def test_bfloat16_products_on_float32_weights_follow_autocast(name: str) -> None:
    model = build(name, initializer_range=0.1)
    made = rollouts(model, SamplingParams(max_new_tokens=20, n=2), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        near = worst_difference(model, made)
    assert 0 < near < 0.15  # the largest are where one of the two chooses another expert
    assert 0 < worst_difference(model, made) < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("name", BOTH)
def test_bad_input_is_one_clear_line(name: str) -> None:
    model = build(name)
    with pytest.raises(UserError, match=r"data\.max_response_length=120.*test:0\.5.*128"):
        rollouts(model, SamplingParams(max_new_tokens=120))
    rollouts(model, SamplingParams(max_new_tokens=114, temperature=0))  # just fits
    with pytest.raises(UserError, match=r"test:0\.1: the prompt has no tokens"):
        rollouts(model, SamplingParams(max_new_tokens=4), lengths=[3, 0])
    tokenizer = FakeTokenizer()
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="end-of-sequence"):
        make_engine(model, tokenizer, max_num_seqs=8, dtype=torch.float32)
    assert rollouts(build(name), SamplingParams(4), lengths=[]) == []
