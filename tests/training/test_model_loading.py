"""What can be wrong with a model's path, each said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seqrl.config.schema import FSDPConfig, ModelConfig
from seqrl.errors import UserError
from seqrl.tiny import write_tiny_model
from seqrl.training.model import choose_device, load_model, load_tokenizer
from seqrl.training.packing import ATTENTION_NAME

KEY = "actor_rollout_ref.model.path"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_model(
        path,
        seed=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_experts=4,
        moe_intermediate_size=32,
        head_dim=16,
    )
    return path


def without(directory: Path, *names: str, to: Path) -> Path:
    for file in directory.iterdir():
        if file.name not in names:
            (to / file.name).symlink_to(file)
    return to


def test_a_tiny_model_loads_as_asked(directory: Path) -> None:
    config = ModelConfig(path=str(directory))
    model = load_model(config, FSDPConfig(), CPU, key=KEY)
    assert model.config._attn_implementation == ATTENTION_NAME
    assert model.config._experts_implementation == "sorted"
    assert model.is_gradient_checkpointing and model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(load_tokenizer(config, key=KEY)) == model.config.vocab_size

    config = ModelConfig(str(directory), enable_gradient_checkpointing=False, experts_implementation="eager")
    model = load_model(config, FSDPConfig(model_dtype="bf16"), CPU, key=KEY)
    assert not model.is_gradient_checkpointing
    assert model.config._experts_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def refusal(config: ModelConfig) -> str:
    """The one line; loading starts with the tokenizer."""
    with pytest.raises(UserError) as refused:
        load_tokenizer(config, key=KEY)
        load_model(config, FSDPConfig(), CPU, key=KEY)
    line = str(refused.value)
    assert "\n" not in line and line.startswith(f"{KEY}={config.path}: ")
    return line


@pytest.mark.parametrize("path", ["/no/such/model", "./no/such", "no/such/model"])
def test_a_path_to_nowhere(path: str) -> None:
    assert refusal(ModelConfig(path)).endswith("no such directory")


def test_a_directory_without_a_config(directory: Path, tmp_path: Path) -> None:
    without(directory, "config.json", to=tmp_path)
    assert "no config.json" in refusal(ModelConfig(str(tmp_path)))


def test_a_directory_without_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    without(directory, "tokenizer.json", to=tmp_path)
    assert "no tokenizer (tokenizer.json)" in refusal(ModelConfig(str(tmp_path)))


def test_a_directory_without_weights(directory: Path, tmp_path: Path) -> None:
    without(directory, "model.safetensors", to=tmp_path)
    assert "cannot load the model: " in refusal(ModelConfig(str(tmp_path)))


def test_an_architecture_nobody_knows(directory: Path, tmp_path: Path) -> None:
    without(directory, "config.json", to=tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "oracle"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refusal(ModelConfig(str(tmp_path)))
    assert "cannot load the" in line and "oracle" in line


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"num_hidden_layers": 3}], ids=["shape", "missing layer"]
)
def test_weights_that_do_not_fit_the_config(directory: Path, tmp_path: Path, change: dict[str, int]) -> None:
    """Transformers would draw what is missing at random, and train it."""
    without(directory, "config.json", to=tmp_path)
    config = json.loads((directory / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refusal(ModelConfig(str(tmp_path)))
    assert "config.json" in line and "model." in line.removeprefix(f"{KEY}={tmp_path}")


def test_broken_weights(directory: Path, tmp_path: Path) -> None:
    without(directory, "model.safetensors", to=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    assert "cannot load the model: " in refusal(ModelConfig(str(tmp_path)))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(UserError, match=r"trainer\.device=cuda: .* write trainer\.device=cpu or auto"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU
