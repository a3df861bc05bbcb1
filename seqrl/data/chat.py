"""A prompt as a row holds it, chat messages or a plain string, made into messages and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from seqrl.data.sources import as_text
from seqrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = tuple[Mapping[str, str], ...]


def encode_prompt(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, *, place: str, column: str
) -> tuple[Messages, tuple[int, ...]]:
    """The messages and their P token ids, chat template and generation prompt applied.

    A plain string is one user message; where the tokenizer has no chat template (a base model) it is
    tokenized as it stands. Raises UserError for a malformed prompt, a list of messages without a chat
    template, or a template that refuses them; `place` names the row in it, `column` the column.
    """
    messages = _messages(prompt, f"{place}: `{column}`")
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError(
                f"{place}: `{column}` holds chat messages, but the tokenizer of "
                f"{tokenizer.name_or_path or 'the model'} has no chat template; take a model that has one, "
                "or write prompts as plain strings"
            )
        return messages, tuple(tokenizer(prompt)["input_ids"])

    from jinja2 import TemplateError  # transformers renders with it

    try:
        tokens = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except TemplateError as error:
        raise UserError(
            f"{place}: the chat template of {tokenizer.name_or_path or 'the model'} refuses `{column}`: "
            f"{error}; change the messages"
        ) from error
    return messages, tuple(tokens)


def _messages(prompt: Any, what: str) -> Messages:
    if isinstance(prompt, str):
        return ({"role": "user", "content": as_text(prompt, what)},)
    if not isinstance(prompt, list):
        raise UserError(f"{what} must be a list of chat messages or a string, not {type(prompt).__name__}")
    if not prompt:
        raise UserError(f"{what} is an empty list; give it at least one message or remove the row")
    return tuple(_message(message, f"{what}, message {i}") for i, message in enumerate(prompt, start=1))


def _message(message: Any, what: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"{what} must be a mapping with `role` and `content`, not {type(message).__name__}")
    missing = [name for name in ("role", "content") if message.get(name) is None]
    if missing:
        raise UserError(f"{what} has no `{missing[0]}`; every message needs `role` and `content`")
    # Parquet gives every message the fields of all of them, null where it has none.
    return {name: as_text(value, f"{what}: `{name}`") for name, value in message.items() if value is not None}
