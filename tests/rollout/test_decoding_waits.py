"""Between two looks at who has ended, the host asks a GPU nothing: here a device that has no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rollout_models import build, make_prompts

from seqrl.native.weights import read_weights
from seqrl.rollout.paged import PagedDecoder
from seqrl.rollout.rows import Request
from seqrl.types import SamplingParams

SAMPLINGS = {
    "plain": SamplingParams(40, n=2),
    "warm": SamplingParams(40, n=2, temperature=0.7),
    "restricted": SamplingParams(40, n=2, top_k=5, top_p=0.9),
    "greedy": SamplingParams(40, n=2, temperature=0),
}


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@torch.no_grad()
def test_joining_and_decoding(unseen: Any, name: str, sampling: SamplingParams) -> None:
    model, prompts = build(name).to("meta"), make_prompts([5, 300, 256, 7])
    weights = read_weights(model, torch.bfloat16, length=512)
    with unseen:
        decoder = PagedDecoder(weights, 8, 400)
        decoder.looks_every = 8
        rows = decoder.rows([1, 2], sampling, 8)
        for joining in (prompts[:2], prompts[2:]):  # the others while these are under way
            tokens = [prompt.tokens for prompt in joining]
            assert decoder.room(tokens, [2, 2]) == 4
            logits = decoder.admit(tokens, [2, 2])
            assert logits.shape == (4, 61) and logits.device.type == "meta"
            requests = [Request(i, j) for i in range(2) for j in range(2)]
            rows.join(requests, ["a", "a", "b", "b"], 0, logits)
            assert decoder.crowded(rows) == 0
            decoder.advance(rows)
        rows.keep([0, 3, 5])
        decoder.keep([0, 3, 5])
        assert decoder.crowded(rows) == 0
        decoder.advance(rows)
    assert rows.drawn == [25, 25, 17] and unseen.sent > 20
    pages = {prompt.tokens: len(decoder.held[i].own) for i, prompt in enumerate((prompts[0], prompts[1]))}
    assert list(pages.values()) == [1, 1], "300 columns of a prompt: a full page that is shared, and its rest"
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        rows.ends.tolist()
