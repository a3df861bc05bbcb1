"""A token step in one call of C says what it says operation by operation, to the last bit."""

from __future__ import annotations

import pytest
import torch
from rollout_models import CACHED, build

from seqrl.kernels import has_tiles
from seqrl.native.weights import read_weights
from seqrl.rollout.layers import LayersInC
from seqrl.rollout.native import CachedDecoder

PROMPTS = [(5, 9, 2), (7,), (3, 4, 8, 11, 2)]
STEPS = 140
"""The cache grows once."""


@pytest.mark.skipif(
    not has_tiles(torch.bfloat16, torch.device("cpu")), reason="a processor without a matrix unit"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["mixed", "bfloat16"])
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("copies", [[8, 1, 5], [200, 60, 3]])
def test_one_call_says_the_same(name: str, dtype: torch.dtype, copies: list[int]) -> None:
    model = build(name, intermediate_size=64, max_position_embeddings=160).to(dtype)
    with torch.inference_mode():
        w = read_weights(model, torch.bfloat16, length=160, keep=True)
        assert LayersInC.fit(w)

        def decoder() -> CachedDecoder:
            made = CachedDecoder(w, sum(copies), len(PROMPTS), 5, STEPS + 1)
            made.admit(PROMPTS, copies)
            return made

        one, many = decoder(), decoder()
        many._layers_in_c = None
        torch.manual_seed(1)
        for step in range(STEPS):
            tokens = torch.randint(61, (len(one.slot),))
            assert torch.equal(one.step(tokens), many.step(tokens)), step
            if step == 20:  # some leave
                kept = range(0, len(tokens), 2)
                one.keep(kept), many.keep(kept)
