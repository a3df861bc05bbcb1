"""Continuous batching: more requests than places, each place taken as soon as it is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rollout_models import CACHED, FakeTokenizer, build, make_prompts
from torch import Tensor

from seqrl.kernels import library
from seqrl.rollout.native import CachedDecoder, NativeEngine
from seqrl.types import Prompt, Rollout, SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here")

LENGTHS = [5, 40, 3, 9, 1, 14]


class Watched(CachedDecoder):
    """Writes down how many rows each step has, and holds that no place is lost or taken twice."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.capacity, self.steps, self.admitted = sizes[1], list[int](), list[int]()
        self.read: list[tuple[int, ...]] = []

    def admit(self, prompts: Sequence[tuple[int, ...]], copies: Sequence[int]) -> Tensor:
        self.admitted.append(sum(copies))
        logits = super().admit(prompts, copies)
        self.check()
        assert len(logits) == sum(copies)
        return logits

    def _prefill(self, prompts: Sequence[tuple[int, ...]], place: Tensor) -> Tensor:
        self.read += prompts
        return super()._prefill(prompts, place)

    def step(self, tokens: Tensor) -> Tensor:
        assert len(tokens) == len(self.slot) > 0, "no step runs for nobody"
        self.steps.append(len(tokens))
        return super().step(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.check()

    def check(self) -> None:
        assert sorted([*self.free, *self.slot.tolist()]) == list(range(self.capacity))
        assert self.latest is not None
        held = {self.latest.place, *self.prompt.tolist()}
        assert sorted([*self.free_prompts, *held]) == list(range(len(self.prompt_columns)))


class WatchedEngine(NativeEngine):
    decoder: Watched

    def _decoder(self, rows: int, prompts: int, prompt_length: int, new_tokens: int) -> Watched:
        made = super()._decoder(rows, prompts, prompt_length, new_tokens)
        assert isinstance(made, CachedDecoder)
        self.decoder = Watched(made.weights, rows, prompts, prompt_length, new_tokens)
        return self.decoder


def talkative(name: str, **changes: Any) -> Any:
    """A model whose responses end all over the place."""
    model = build(name, **changes)
    model.generation_config.eos_token_id = [*range(5)]
    return model


def made_by(
    model: Any, prompts: list[Prompt], sampling: SamplingParams, places: int
) -> tuple[list[Rollout], Watched]:
    engine = WatchedEngine(model, FakeTokenizer(), max_num_seqs=places, dtype=torch.float32)
    return engine.generate(prompts, sampling, seed=3, policy_version=0), engine.decoder


def alike(one: list[Rollout], other: list[Rollout]) -> None:
    assert [r.tokens.tolist() for r in one] == [r.tokens.tolist() for r in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=2e-4)
        assert (a.finished, a.text, a.group) == (b.finished, b.text, b.group)


@pytest.mark.parametrize(("name", "places"), [("qwen3/32", 1), ("qwen3/32", 4), ("qwen3_moe_64/64", 7)])
def test_few_places_give_the_same_responses(name: str, places: int) -> None:
    model, prompts = talkative(name), make_prompts(LENGTHS)
    sampling = SamplingParams(max_new_tokens=25, n=4)
    together, _ = made_by(model, prompts, sampling, 64)
    lengths = [len(r.tokens) for r in together]
    assert len(set(lengths)) > 8, "else few would join late"
    apart, decoder = made_by(model, prompts, sampling, places)
    alike(together, apart)
    assert decoder.capacity == places and max(decoder.steps) <= places
    in_order = sorted((prompt.tokens for prompt in prompts), key=len)
    assert [len(prompt) for prompt in decoder.read] == [len(prompt) for prompt in in_order], "each once"
    assert set(decoder.read) == set(in_order)


def test_places_are_taken_at_once() -> None:
    """Every step has all rows while somebody waits, so their number is what the lengths ask for."""
    model, prompts, places = talkative("qwen3/32"), make_prompts(LENGTHS), 5
    made, decoder = made_by(model, prompts, SamplingParams(max_new_tokens=30, n=4), places)
    lengths = {(r.group, i % 4): len(r.tokens) for i, r in enumerate(made)}
    order = sorted(range(len(LENGTHS)), key=lambda i: LENGTHS[i])  # as the engine takes them
    waiting = [lengths[group, response] for group in order for response in range(4)]
    rows: list[int] = []
    expected: list[int] = []
    while waiting or rows:
        joining, waiting = waiting[: places - len(rows)], waiting[places - len(rows) :]
        rows = [left - 1 for left in [*rows, *joining] if left > 1]  # each draws one token
        if rows:
            expected.append(len(rows))
    assert decoder.steps == expected
    assert sum(decoder.admitted) == len(made) and len(decoder.admitted) > 5


def test_all_end_at_once_and_others_follow() -> None:
    """Equal lengths: nothing is left of one wave when the next is read."""
    model, prompts = build("qwen3/32"), make_prompts(LENGTHS)
    sampling = SamplingParams(max_new_tokens=6, n=2, ignore_eos=True)
    together, _ = made_by(model, prompts, sampling, 64)
    waves, decoder = made_by(model, prompts, sampling, 5)
    alike(together, waves)
    assert decoder.admitted == [5, 5, 2]
    assert decoder.steps == [5] * 10 + [2] * 5
    assert sorted(decoder.free) == list(range(5)) and len(decoder.free_prompts) == 5


def test_one_token_each() -> None:
    """Everybody leaves as soon as they have come: no step at all."""
    made, decoder = made_by(
        build("qwen3/32"), make_prompts(LENGTHS), SamplingParams(max_new_tokens=1, n=3), 4
    )
    assert [len(r.tokens) for r in made] == [1] * 18
    assert decoder.steps == [] and decoder.admitted == [4, 4, 4, 4, 2]


def test_prompts_longer_than_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("qwen3/32"), make_prompts(LENGTHS)
    sampling = SamplingParams(max_new_tokens=12, n=2)
    together, _ = made_by(model, prompts, sampling, 64)
    monkeypatch.setattr("seqrl.rollout.native._PREFILL_TOKENS", 8)
    alike(together, made_by(model, prompts, sampling, 64)[0])


def test_caches_of_every_size_of_head() -> None:
    """32 and 64, one key head, and as many key heads as query heads."""
    for name, changes in ((CACHED[0], {"num_key_value_heads": 4}), ("qwen3/64", {"num_key_value_heads": 1})):
        model, prompts = talkative(name, **changes), make_prompts(LENGTHS)
        sampling = SamplingParams(max_new_tokens=20, n=3)
        alike(made_by(model, prompts, sampling, 64)[0], made_by(model, prompts, sampling, 4)[0])


def test_room_for_responses_grows_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = talkative("qwen3/32", eos_token_id=60), make_prompts(LENGTHS)
    sampling = SamplingParams(max_new_tokens=70, n=3)
    at_once, roomy = made_by(model, prompts, sampling, 8)
    monkeypatch.setattr("seqrl.rollout.native._FIRST_COLUMNS", 16)
    grown, decoder = made_by(model, prompts, sampling, 8)
    assert [r.tokens.tolist() for r in at_once] == [r.tokens.tolist() for r in grown]
    longest = max(len(r.tokens) for r in grown)
    assert longest > 32 and roomy.own[0].columns == 96
    assert longest - 1 <= decoder.own[0].columns < 2 * longest
