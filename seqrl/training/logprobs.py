"""Log-probs and entropies of response tokens: the model's forward, from flat batch to flat numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqrl.training.packing import Layout, shared_prompts
from seqrl.types import Batch


def response_logprobs(
    model: Any, part: Batch, *, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens of `part`, a micro-batch on the model's device.

    Logits exist only where they predict a response token; they are divided by `temperature`, so that
    these are the log-probs of the distribution the tokens were drawn from.

    Returns:
        Two tensors [R], R response tokens in the order of `part.tokens[part.response_mask]`, float32
        (float64 of a float64 model); the entropy carries gradient only if asked to.
    """
    layout = Layout.of(part.offsets, shared_prompts(part))
    predicted = part.response_mask.nonzero()[:, 0]
    with _only(model.get_output_embeddings(), layout.source[predicted - 1]):
        logits = model(
            input_ids=part.tokens[layout.computed][None],
            position_ids=layout.positions[None],
            use_cache=False,
            layout=layout,
        ).logits[0]  # [R, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # [R, V]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, part.tokens[predicted, None])[:, 0], entropy


@contextmanager
def _only(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """For this time `head` sees only these positions of its input [1, T, H].

    Transformers' own `logits_to_keep` indexes instead, whose backward adds up row by row on a CPU.
    """
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].index_select(1, positions),))
    try:
        yield
    finally:
        hook.remove()
