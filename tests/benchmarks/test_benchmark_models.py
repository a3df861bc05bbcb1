"""The models of the benchmarks are as large as they say, and end their responses at log-normal lengths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import SHAPES, SIGMA, make_model, write_model

MILLIONS = {"dense-3m": 3.2, "dense-25m": 25.4, "moe-8x2": 7.2, "moe-64x8": 13.5}
MEAN_LENGTH, LIMIT = 64.0, 256


@pytest.mark.parametrize("name", SHAPES)
def test_models_have_the_promised_size_and_dtype(name: str) -> None:
    model = make_model(name, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.max_position_embeddings >= 8192


def test_the_seed_decides_and_the_vocabulary_can_be_another() -> None:
    one, same = (make_model("dense-3m", seed=1).lm_head.weight for _ in range(2))
    other = make_model("dense-3m", vocab_size=1000, seed=2).lm_head.weight
    assert torch.equal(one, same)
    assert other.shape[0] == 1000
    assert not torch.equal(one, other[: len(one)])


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in SHAPES), ("moe-8x2", "bfloat16")]
)
def test_responses_end_at_log_normal_lengths(name: str, dtype: str, tmp_path: Path) -> None:
    write_model(name, tmp_path, mean_length=MEAN_LENGTH, limit=LIMIT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    longer = survival(model, AutoTokenizer.from_pretrained(tmp_path))
    length = torch.arange(LIMIT, dtype=torch.float64)
    deviations = (length.log() - math.log(MEAN_LENGTH) + SIGMA**2 / 2) / SIGMA
    wanted = torch.erfc(deviations / math.sqrt(2)) / 2
    assert float(longer.sum()) == pytest.approx(float(wanted.sum()), rel=0.05)
    assert float((longer - wanted).abs().max()) < 0.03


@torch.no_grad()
def survival(model: Any, tokenizer: Any) -> Tensor:
    """The share of responses of bytes drawn at random that are longer than 0, 1, 2 ... tokens, [LIMIT]."""
    chat = [{"role": "user", "content": "17+8-6"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    torch.manual_seed(0)
    responses = torch.randint(0, 256, (4, LIMIT - 1))
    tokens = torch.cat([torch.tensor([prompt]).expand(4, -1), responses], dim=1)
    logits = model(tokens).logits[:, len(prompt) - 1 :].double()  # before each token of a response
    hazard = logits.softmax(-1)[..., tokenizer.eos_token_id].mean(0)
    return torch.cat([hazard.new_ones(1), (1 - hazard).cumprod(0)[:-1]])
