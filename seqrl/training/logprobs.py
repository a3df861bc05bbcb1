"""What the policy says of response tokens: the model's forward, from flat batch to flat numbers.

Shape legend: R response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from seqrl.kernels import recurring
from seqrl.training.forward import response_hidden, response_logits
from seqrl.training.head import MAX_LOGITS, Logits, token_statistics
from seqrl.training.head import TokenStatistics as TokenStatistics
from seqrl.training.packing import Layout
from seqrl.types import Batch

SCALED_LOGITS = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""Where a model's config has one of these, its logits are more than its head's output."""


def response_statistics(
    model: Any,
    part: Batch,
    *,
    temperature: float,
    entropy: bool = False,
    entropy_gradient: bool = False,
    sum_pi_squared: bool = False,
    reference: Any = None,
) -> TokenStatistics:
    """What `model` says of the response tokens of `part`, a micro-batch on its device.

    Logits exist only where they predict a response token, and at most `MAX_LOGITS` of them at a time;
    they are divided by `temperature`, so that these are the log-probs of the distribution the tokens
    were drawn from. With a `reference` model the full KL divergence from it is part of the answer.

    The R tokens are in the order of `part.tokens[part.response_mask]`.
    """
    layout = Layout.of_batch(part)
    predicted = part.response_mask.nonzero()[:, 0]
    positions, tokens = layout.source[predicted - 1], part.tokens[predicted]
    count = tokens.numel()
    extra = recurring(count, tokens.device) - count
    positions, tokens = F.pad(positions, (0, extra)), F.pad(tokens, (0, extra))

    def logits_of(model: Any) -> Logits:
        if not has_plain_head(model):
            return Logits(response_logits(model, part, layout, positions))
        head = model.get_output_embeddings()
        return Logits(response_hidden(model, part, layout, positions), head.weight, head.bias)

    theirs = None
    if reference is not None:
        with torch.no_grad():
            theirs = logits_of(reference)
    said = token_statistics(
        logits_of(model),
        tokens,
        temperature=temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        sum_pi_squared=sum_pi_squared,
        reference=theirs,
        max_logits=MAX_LOGITS,
    )
    return said.first(count)


def has_plain_head(model: Any) -> bool:
    """Whether the logits are what the output embeddings make of the last hidden states, and no more."""
    config = model.config.get_text_config()
    return not any(getattr(config, name, None) for name in SCALED_LOGITS)
