"""A token step in one call of C says what it says operation by operation, to the last bit."""

from __future__ import annotations

import pytest
import torch
from rollout_models import CACHED, build

from seqrl.native.weights import read_weights
from seqrl.rollout.layers import LayersInC
from seqrl.rollout.native import CachedDecoder

PROMPTS = [(5, 9, 2), (7,), (3, 4, 8, 11, 2)]
STEPS = 140
"""The cache grows once."""


@pytest.mark.parametrize(
    ("held", "dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.float32, torch.bfloat16, id="mixed"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("copies", [[8, 1, 5], [200, 60, 3]])
def test_one_call_says_the_same(
    threads: int, name: str, held: torch.dtype, dtype: torch.dtype, copies: list[int]
) -> None:
    """With many rows each thread has its own, before some leave and after; with few they share all."""
    experts = {"moe_intermediate_size": 64} if "moe" in name else {}  # then they are in C
    model = build(name, intermediate_size=64, max_position_embeddings=160, **experts).to(held)
    with torch.inference_mode():
        w = read_weights(model, dtype, length=160, keep=True)
        if not LayersInC.fit(w):
            pytest.skip("the library adds up in a way of its own on this processor")

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
