"""The tiny model is an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from seqrl.tiny import END, make_tokenizer, write_tiny_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, seed=1, **SMALL)
    return path


def test_the_default_is_a_mixture_of_experts_of_half_a_million_to_two_million(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert 500_000 <= model.num_parameters() <= 2_000_000
    assert model.config.num_experts >= 8 and model.config.num_experts_per_tok == 2


def test_plain_transformers_loads_it_and_generates(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert inputs["input_ids"].shape[1] < out.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone(directory: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_tiny_model(tmp_path / "same", seed=1, **SMALL)
    write_tiny_model(tmp_path / "other", seed=2, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (
        load_file(path / "model.safetensors") for path in (directory, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("text", ["12+7=19;19-4=15;15", "é 你好 \n\t<>", "<|im_end", "\x00\x7f"])
def test_the_tokenizer_takes_any_text_and_gives_it_back(text: str) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert 0 < len(tokens) <= len(text.encode()), "a token holds at least a byte"


def test_the_chat_template_marks_who_speaks_and_where_the_answer_begins() -> None:
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    tokens = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(tokens) == [
        *("<|user|>", "1", "+", "1", END),
        *("<|assistant|>", "2", END),
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert tokens[: len(prompt)] == prompt and tokens[len(prompt) :] == tokenizer("2" + END)["input_ids"]
    assert tokenizer.eos_token == END and tokenizer.pad_token_id != tokenizer.eos_token_id
