"""Loading and saving: Hugging Face directories and hub names, model and tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from seqrl.config.schema import FSDPConfig, ModelConfig
from seqrl.errors import UserError
from seqrl.training import experts
from seqrl.training.packing import ATTENTION_NAME, Layout, register

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for `cuda` where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda: PyTorch sees no GPU here; write trainer.device=cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_tokenizer(config: ModelConfig, *, key: str) -> Any:
    """The tokenizer that lies with the model. `key` is the config key of the model's path."""
    from transformers import AutoTokenizer

    path = _resolve(config.path, key)
    if os.path.isdir(path) and not any(
        (Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise UserError(
            f"{key}={config.path}: the directory has no tokenizer (tokenizer.json); "
            "save one there with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={config.path}: cannot load the tokenizer: {_first_line(error)}") from error


def load_model(config: ModelConfig, precision: FSDPConfig, device: torch.device, *, key: str) -> Any:
    """The causal language model, in `precision.model_dtype`, with seqrl's flat attention."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what does not fit is told below
    register()
    path = _resolve(config.path, key)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            config=_model_config(path, config),
            dtype=DTYPES[precision.model_dtype],
            trust_remote_code=config.trust_remote_code,
            attn_implementation=ATTENTION_NAME,
        )
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key}={config.path}: cannot load the model: {_first_line(error)}") from error
    model, loading = loaded
    if unfit := sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}):
        raise UserError(
            f"{key}={config.path}: the weights do not fit config.json: {unfit[0]} is missing or of another "
            f"shape ({len(unfit)} in all); give a directory whose weights and config belong together"
        )
    _make_saveable(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a ratio compares one network with itself
    _choose_experts(model, config)
    if config.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train()


def _model_config(path: str, config: ModelConfig) -> Any:
    """The model's config.json, with the user's values in place of its own."""
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    text = loaded.get_text_config()
    for name, value in config.override_config.items():
        if not hasattr(text, name):
            raise UserError(
                f"model.override_config.{name}={value}: the config.json of {config.path} has no such name; "
                "remove it"
            )
        setattr(text, name, value)
    return loaded


def _make_saveable(model: Any) -> None:
    """Transformers loads a generation config with a temperature and no `do_sample`, but saves none."""
    if model.can_generate():
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config.do_sample = True


def _choose_experts(model: Any, config: ModelConfig) -> None:
    """How mixture-of-experts layers are computed, where this model leaves a choice."""
    if model._can_set_experts_implementation():
        experts.register()
        model.set_experts_implementation(config.experts_implementation or experts.EXPERTS_NAME)
    elif config.experts_implementation is not None:
        raise UserError(
            f"model.experts_implementation={config.experts_implementation}: {type(model).__name__} leaves no "
            "choice; write model.experts_implementation=null"
        )


def check_flat_forward(model: Any) -> None:
    """Two sequences in one flat row must not see each other; some architectures cannot keep them apart.

    Raises UserError where a sequence's logits depend on the one before it.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(16, device=device) % model.config.get_text_config().vocab_size

    def logits(tokens: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        layout = Layout.of(torch.tensor(offsets)).to(device)
        return model(
            input_ids=tokens[None], position_ids=layout.positions[None], use_cache=False, layout=layout
        ).logits[0]

    with torch.no_grad():
        together, alone = logits(tokens, [0, 9, 16])[9:], logits(tokens[9:], [0, 7])
    difference = (together - alone).abs().max() / alone.abs().max()
    if not difference < 0.05:
        raise UserError(
            f"{type(model).__name__} lets sequences of one micro-batch see each other "
            f"(logits differ by {difference:.0%}): seqrl cannot train this architecture"
        )


def _resolve(path: str, key: str) -> str:
    """A directory as it is, a hub name as it is; what is clearly a missing path is refused."""
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        if not os.path.isfile(os.path.join(expanded, "config.json")):
            raise UserError(f"{key}={path}: the directory has no config.json; it is no Hugging Face model")
        return expanded
    if expanded.startswith(("/", ".")) or expanded.count("/") > 1:
        raise UserError(f"{key}={path}: no such directory")
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
