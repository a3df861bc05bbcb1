"""What the policy says of response tokens: the model's forward, from flat batch to flat numbers.

Shape legend: R response tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqrl.kernels import Record, filled_up, sent
from seqrl.native.forward import can_record
from seqrl.native.weights import Weights
from seqrl.training.forward import (
    is_native,
    native_hidden,
    native_weights,
    response_hidden,
    response_logits,
)
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
    """What `model` says of the response tokens of `part`, a micro-batch on the host; the answer is on the
    model's device, and not waited for.

    Logits exist only where they predict a response token, and at most `MAX_LOGITS` of them at a time;
    they are divided by `temperature`, so that these are the log-probs of the distribution the tokens
    were drawn from. With a `reference` model the full KL divergence from it is part of the answer.

    The R tokens are in the order of `part.tokens[part.response_mask]`.
    """
    targets = _Targets.of(part).to(model.device)
    of_logprobs_alone = not entropy_gradient and not sum_pi_squared and reference is None
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradient = bool(torch.is_grad_enabled() and trained)
    if gradient and of_logprobs_alone and has_plain_head(model) and is_native(model):
        w = native_weights(model, targets.layout)
        if can_record(w):
            recorded = _Recorded(model, w, trained, part, targets, temperature)
            logprobs = _RecordedLogprobs.apply(recorded, trained[0])
            return TokenStatistics(logprobs, entropy=recorded.said.entropy if entropy else None)

    def logits_of(model: Any) -> Logits:
        if not has_plain_head(model):
            return Logits(response_logits(model, targets.computed, targets.layout, targets.positions))
        head = model.get_output_embeddings()
        hidden = response_hidden(model, targets.computed, targets.layout, targets.positions)
        return Logits(hidden, head.weight, head.bias)

    theirs = None
    if reference is not None:
        with torch.no_grad():
            theirs = logits_of(reference)
    said = token_statistics(
        logits_of(model),
        targets.tokens,
        temperature=temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        sum_pi_squared=sum_pi_squared,
        reference=theirs,
        max_logits=MAX_LOGITS,
    )
    return said.first(targets.count)


@dataclass(frozen=True)
class _Targets:
    """The response tokens of a micro-batch, and which hidden states predict them."""

    layout: Layout
    computed: Tensor
    """[T'], the tokens that go through the model."""
    positions: Tensor
    """Index into the computed tokens, for each of R response tokens and a few more that nobody sees."""
    tokens: Tensor
    """Of the same, index into the vocabulary."""
    count: int
    """R"""

    @classmethod
    def of(cls, part: Batch) -> _Targets:
        layout = Layout.of_batch(part)
        predicted = part.response_mask.nonzero()[:, 0]
        positions, tokens = layout.source[predicted - 1], part.tokens[predicted]
        computed = part.tokens[layout.computed]
        return cls(layout, computed, filled_up(positions), filled_up(tokens), len(tokens))

    def to(self, device: torch.device) -> _Targets:
        return _Targets(
            self.layout.to(device),
            sent(self.computed, device),
            sent(self.positions, device),
            sent(self.tokens, device),
            self.count,
        )


class _Recorded:
    """The forward of a micro-batch without autograd, of which any part can have a gradient afterwards.

    A sequence whose log-probs have the gradient 0, because it is clipped or its group is of one opinion, adds
    nothing to that of any weight. So the backward pass is of the others alone.
    """

    def __init__(
        self,
        model: Any,
        w: Weights,
        trained: list[Tensor],
        part: Batch,
        targets: _Targets,
        temperature: float,
    ) -> None:
        self._w, self._head, self._temperature = w, model.get_output_embeddings(), temperature
        self._trained = trained
        self._part, self._targets, self._record = part, targets, Record()
        with torch.no_grad():
            recording = self._record.recording
            self.said = self._forward(targets, recording(), recording()).first(targets.count)

    def backward(self, of_logprobs: Tensor) -> None:
        """Adds the gradient of each weight that is trained, given that of the log-probs [R]. Once: what was
        recorded is used up."""
        part, targets, rows, responses = self._part, self._targets, None, None
        sequence = torch.arange(len(part), device=of_logprobs.device).repeat_interleave(part.response_lengths)
        kept = sequence[of_logprobs != 0].unique()
        if len(kept) < len(part):
            kept = kept if len(kept) else kept.new_zeros(1)  # every weight gets a gradient, if only 0
            part = part.select(kept)
            layout, targets = self._targets.layout, _Targets.of(part)
            computed = self._part.token_index(kept)[targets.layout.computed]
            rows = filled_up(layout.source[computed])
            responses = self._part.response_mask.cumsum(0)[self._part.response_token_index(kept)] - 1
            of_logprobs, responses = of_logprobs[responses], filled_up(responses)
        with torch.enable_grad():
            replaying = self._record.replaying
            said = self._forward(targets, replaying(rows), replaying(responses)).first(targets.count)
            torch.autograd.backward(said.logprobs, of_logprobs, inputs=self._trained)

    def _forward(
        self,
        targets: _Targets,
        of_tokens: AbstractContextManager[None],
        of_responses: AbstractContextManager[None],
    ) -> TokenStatistics:
        with of_tokens:
            hidden = native_hidden(self._w, targets.computed, targets.layout)
            hidden = hidden.index_select(0, targets.positions)
        with of_responses:
            return token_statistics(
                Logits(hidden, self._head.weight, self._head.bias),
                targets.tokens,
                temperature=self._temperature,
                entropy=True,
                max_logits=MAX_LOGITS,
            )


class _RecordedLogprobs(torch.autograd.Function):
    """[R]. Their gradient goes through the sequences that have one, straight to the `grad` of the weights: a
    second set of gradients, to be added by autograd, would be as large as the model."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, any_weight: Tensor) -> Tensor:
        ctx.recorded = recorded
        return recorded.said.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        recorded, ctx.recorded = ctx.recorded, None  # it holds copies of weights, too
        assert recorded is not None, "a second backward pass: what was recorded is used up"
        recorded.backward(grad)
        return None, None


def has_plain_head(model: Any) -> bool:
    """Whether the logits are what the output embeddings make of the last hidden states, and no more."""
    config = model.config.get_text_config()
    return not any(getattr(config, name, None) for name in SCALED_LOGITS)
