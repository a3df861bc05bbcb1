"""Rows in verl's schema, from files and procedural tasks, made into tokenized prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seqrl.config.schema import DataConfig
from seqrl.data.chat import encode_prompt
from seqrl.data.sources import Row, as_text, read_rows
from seqrl.errors import UserError
from seqrl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_prompts(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, key: str
) -> list[Prompt]:
    """The prompts of all `files`, in their order, none longer than `config.max_prompt_length` tokens.

    `key` is the config key that lists the files, for messages. What is dropped or cut for its length
    is counted in one logged warning. Raises UserError for a source or row that cannot be used, for a
    prompt that is too long where nothing allows for it, and where filtering leaves no prompt.
    """
    limit = config.max_prompt_length
    prompts: list[Prompt] = []
    n_read = n_cut = 0
    for row in read_rows(files, key=key):
        messages, tokens = _encode(row, tokenizer, config)
        n_read += 1
        if len(tokens) > limit:
            if config.filter_overlong_prompts:
                continue
            tokens = _cut(tokens, limit, config.truncation, row.place)
            n_cut += 1
        prompts.append(_prompt(row, messages, tokens, config))

    if n_read and not prompts:
        raise UserError(
            f"{key}: all {n_read} prompts are longer than data.max_prompt_length={limit}; raise it"
        )
    if n_read > len(prompts):
        _warn_long(key, "dropped", n_read - len(prompts), n_read, limit)
    if n_cut:
        _warn_long(key, "cut", n_cut, n_read, limit)
    return prompts


def overlap(train: Sequence[Prompt], val: Sequence[Prompt]) -> int:
    """The number of `val` prompts whose tokens also occur in `train`."""
    known = {prompt.tokens for prompt in train}
    return sum(prompt.tokens in known for prompt in val)


def _names(row: Row, config: DataConfig) -> DataConfig:
    """The config that names this row's columns: procedural rows have the default names."""
    return DataConfig() if row.generated else config


def _encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[tuple[Mapping[str, str], ...], tuple[int, ...]]:
    column = _names(row, config).prompt_key
    prompt = row.column(column, hint="set data.prompt_key to the column that holds the prompt")
    return encode_prompt(prompt, tokenizer, place=row.place, column=column)


def _prompt(
    row: Row, messages: tuple[Mapping[str, str], ...], tokens: tuple[int, ...], config: DataConfig
) -> Prompt:
    source = _names(row, config).reward_fn_key
    data_source = row.column(source, hint="set data.reward_fn_key to the column that names the verifier")
    reward_model = _mapping(row, "reward_model")
    if reward_model.get("ground_truth") is None:
        raise UserError(
            f"{row.place}: no ground truth; put the right answer into `reward_model`: {{'ground_truth': ...}}"
        )
    return Prompt(
        uid=row.uid,
        data_source=as_text(data_source, f"{row.place}: `{source}`"),
        messages=messages,
        ground_truth=reward_model["ground_truth"],
        extra_info=_mapping(row, "extra_info"),
        tokens=tokens,
    )


def _mapping(row: Row, column: str) -> Mapping[str, Any]:
    value = row.columns.get(column)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{row.place}: `{column}` must be a mapping, not {type(value).__name__}; correct it")
    return value


def _cut(tokens: tuple[int, ...], limit: int, truncation: str, place: str) -> tuple[int, ...]:
    if truncation == "left":
        return tokens[len(tokens) - limit :]
    if truncation == "right":
        return tokens[:limit]
    if truncation == "middle":
        head = limit // 2
        return tokens[:head] + tokens[len(tokens) - (limit - head) :]
    if truncation == "error":
        raise UserError(
            f"{place}: the prompt is {len(tokens)} tokens long, more than data.max_prompt_length={limit}; "
            "raise it, or set data.filter_overlong_prompts=true or data.truncation=left"
        )
    raise UserError(f"data.truncation={truncation} is not known; write error, left, right or middle")


def _warn_long(key: str, what: str, count: int, total: int, limit: int) -> None:
    logger.warning("%s: %s %d of %d prompts longer than %d tokens", key, what, count, total, limit)
