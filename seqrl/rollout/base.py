"""What a rollout engine is, and which one a model gets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from seqrl.types import Prompt, Rollout, SamplingParams

_log = logging.getLogger(__name__)


class RolloutEngine(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, policy_version: int
    ) -> list[Rollout]:
        """`sampling.n` responses per prompt, the responses of a prompt side by side, prompts in order.

        `group` is the index of the prompt in this call. Response i of a prompt depends on the weights,
        `sampling` and (`seed`, `prompt.uid`, i), and not on who shares its batch (up to floating-point
        ties); the same prompt twice in a call therefore gets the same responses twice.
        Raises UserError for an empty prompt and for one that leaves no room for `max_new_tokens`.
        """
        ...


def make_engine(model: Any, tokenizer: Any, *, max_num_seqs: int, dtype: torch.dtype) -> RolloutEngine:
    """The fastest engine that knows the architecture of `model` (a transformers causal language model).

    The engine reads the tensors of `model` at each call and writes none of them. `max_num_seqs` is the
    most rows decoded at once, `dtype` the type of the matrix products.
    Raises UserError where neither model nor tokenizer names an end-of-sequence token.
    """
    from seqrl.native.weights import why_unreadable
    from seqrl.rollout.native import NativeEngine
    from seqrl.rollout.transformers_engine import TransformersEngine

    reason = why_unreadable(model)
    if reason is None:
        return NativeEngine(model, tokenizer, max_num_seqs=max_num_seqs, dtype=dtype)
    _log.warning(
        "rollout: no native decoding for %s (%s); using its transformers forward, which is slower",
        type(model).__name__,
        reason,
    )
    return TransformersEngine(model, tokenizer, max_num_seqs=max_num_seqs, dtype=dtype)
