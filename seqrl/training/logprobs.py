"""Log-probs and entropies of response tokens: the model's forward, from flat batch to flat numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqrl.training.packing import Layout
from seqrl.types import Batch


def response_logprobs(
    model: Any, part: Batch, *, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens of `part`, a micro-batch on the model's device.

    Logits exist only where they predict a response token; they are divided by `temperature`, so that
    these are the log-probs of the distribution the tokens were drawn from.

    Returns:
        Two float32 tensors [R], R response tokens in the order of `part.tokens[part.response_mask]`;
        the entropy carries gradient only if asked to.
    """
    layout = Layout.of(part.offsets)
    predicted = part.response_mask.nonzero()[:, 0]
    logits = model(
        input_ids=part.tokens[None],
        position_ids=layout.positions[None],
        logits_to_keep=predicted - 1,
        use_cache=False,
        layout=layout,
    ).logits[0]
    logprobs = (logits.float() / temperature).log_softmax(-1)  # [R, V]
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, part.tokens[predicted, None])[:, 0], entropy
