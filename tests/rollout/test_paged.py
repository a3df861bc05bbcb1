"""Decoding on pages, as on CUDA: steps that are captured and replayed, endings told late, memory that
is short. Here on a CPU, with graphs that replay by running the step again and hold that nothing has moved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rollout_models import FakeTokenizer, build, forward_logits, make_prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqrl.errors import UserError
from seqrl.kernels import attend_pages, call
from seqrl.native import experts
from seqrl.rollout import native, paged
from seqrl.rollout.native import NativeEngine
from seqrl.rollout.paged import PagedDecoder, filled_number
from seqrl.types import Prompt, Rollout, SamplingParams

LENGTHS = [5, 40, 3, 9, 1, 64]
PAGE = 8


class Seen(TorchDispatchMode):
    """Each operation, with the numbers it was given and the addresses of tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self._made: list[Tensor] = []
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        self.operations.append((func, *map(self._named, given)))
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and self._address(x) not in {self._address(y) for y in given}:
                self._own.add(self._address(x))
                self._made.append(x)  # else another would be made at its address
        return out

    @staticmethod
    def _address(x: Any) -> int:
        return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else -1

    def _named(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return (*x.shape, *x.stride(), None if self._address(x) in self._own else x.data_ptr())


class FakeGraphs:
    """Captures what is real: each replay does, with the same tensors, what the first run did."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        with Seen() as first:
            step()
        self.captured += 1

        def replay() -> None:
            with Seen() as again:
                step()
            assert again.operations == first.operations, "a graph would not have seen the difference"
            self.replayed += 1

        return replay


class CapturingEngine(NativeEngine):
    """As on CUDA: several steps between looks, whose answer comes a look later."""

    steps_between_looks = 3

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.fake = FakeGraphs()

    def _can_capture(self) -> bool:
        return True

    def _capture(self) -> Any:
        return self.fake

    def _decoder(self, *sizes: int) -> PagedDecoder:
        made = super()._decoder(*sizes)
        assert isinstance(made, PagedDecoder)
        made.waits, made.looks_every = False, self.steps_between_looks
        return made

    @property
    def decoder(self) -> PagedDecoder:
        assert self._kept is not None
        return self._kept.decoder


@pytest.fixture(autouse=True)
def small_pages_and_no_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "library", lambda: None)
    monkeypatch.setattr(paged, "_PAGE", PAGE)
    monkeypatch.setattr(native, "FLASH_PAGE", PAGE)


def talkative(name: str = "qwen3", **changes: Any) -> Any:
    """A model whose responses end all over the place."""
    model = build(name, **changes)
    model.generation_config.eos_token_id = [*range(5)]
    return model


def engine_of(model: Any, places: int = 64, kind: Any = CapturingEngine) -> Any:
    return kind(model, FakeTokenizer(), max_num_seqs=places, dtype=model.dtype)


def generated(engine: Any, sampling: SamplingParams, prompts: list[Prompt] | None = None) -> list[Rollout]:
    prompts = make_prompts(LENGTHS) if prompts is None else prompts
    return engine.generate(prompts, sampling, seed=3, policy_version=0)


def alike(one: list[Rollout], other: list[Rollout]) -> None:
    assert [r.tokens.tolist() for r in one] == [r.tokens.tolist() for r in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=2e-4)
        assert (a.finished, a.text, a.group) == (b.finished, b.text, b.group)


def all_given_back(decoder: PagedDecoder) -> None:
    """No page is lost or held twice: all but the latest prompt's are free."""
    latest = [] if decoder.latest is None else decoder.latest.prompt.pages
    assert sorted([*decoder.pages.free, *latest]) == list(range(1, decoder.pages.count))
    assert decoder.held == []


SAMPLING = SamplingParams(max_new_tokens=25, n=4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe", "qwen3/32"])
@pytest.mark.parametrize("places", [5, 64])
def test_responses_are_the_same_whatever_is_captured(
    name: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few places, so that rows join late; numbers of rows that graphs do not have; a look each third step."""
    monkeypatch.setattr(experts, "_one_by_one", experts._in_groups)  # as on CUDA
    model = talkative(name)
    right = generated(engine_of(model, kind=NativeEngine), SAMPLING)
    assert len({len(r.tokens) for r in right}) > 8, "else few would leave early"
    engine = engine_of(model, places)
    alike(right, generated(engine, SAMPLING))
    all_given_back(engine.decoder)
    assert engine.fake.replayed > engine.fake.captured > 0


def test_the_same_prompt_twice_and_another_of_the_same_tokens() -> None:
    """Each is read by itself, and each has responses of its own number."""
    model, (one, other) = talkative(), make_prompts([21, 5])
    prompts = [one, one, replace(one, uid="another", tokens=(*one.tokens,)), other]
    right = generated(engine_of(model, kind=NativeEngine), SAMPLING, prompts)
    made = generated(engine_of(model, 6), SAMPLING, prompts)
    alike(right, made)
    assert [r.tokens.tolist() for r in made[:4]] == [r.tokens.tolist() for r in made[4:8]]
    assert [r.tokens.tolist() for r in made[:4]] != [r.tokens.tolist() for r in made[8:12]]


@pytest.mark.parametrize("between", [1, 2, 8, 40])
def test_responses_are_the_same_however_often_one_looks(between: int) -> None:
    model = talkative()
    right = generated(engine_of(model, kind=NativeEngine), SAMPLING)
    engine = engine_of(model, 7)
    engine.steps_between_looks = between
    alike(right, generated(engine, SAMPLING))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=1, n=3),
        SamplingParams(max_new_tokens=17, n=2, ignore_eos=True),
        SamplingParams(max_new_tokens=20, temperature=0),
        SamplingParams(max_new_tokens=20, n=3, temperature=0.7, top_k=7, top_p=0.9),
    ],
    ids=["one token", "equal lengths", "greedy", "restricted"],
)
def test_ways_to_sample(sampling: SamplingParams) -> None:
    model = talkative()
    right = generated(engine_of(model, kind=NativeEngine), sampling)
    alike(right, generated(engine_of(model, 5), sampling))


def test_float64_against_transformers() -> None:
    """To the last digit or so; transformers' norms and angles are float32."""
    model = talkative().double()
    for r in generated(engine_of(model, 7), SamplingParams(max_new_tokens=40, n=2)):
        expected = forward_logits(model, r.prompt, r.tokens).log_softmax(-1)
        torch.testing.assert_close(
            r.logprobs.double(), expected.gather(-1, r.tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5
        )


def test_graphs_live_on_and_see_the_weights_as_they_are() -> None:
    """Joined and cast matrices are filled in where they are, and nothing is captured anew."""
    model = talkative()
    engine, other = (engine_of(model, 5, kind) for kind in (CapturingEngine, NativeEngine))
    engine.dtype = other.dtype = torch.bfloat16
    sampling = SamplingParams(max_new_tokens=17, n=3, ignore_eos=True)
    first, _ = generated(engine, sampling), generated(engine, sampling)
    captured, decoder = engine.fake.captured, engine.decoder
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = generated(engine, sampling)
    assert engine.decoder is decoder and engine.fake.captured == captured
    assert [r.tokens.tolist() for r in first] != [r.tokens.tolist() for r in second]
    alike(generated(other, sampling), second)


def test_another_way_to_sample_has_graphs_of_its_own_and_two_are_kept() -> None:
    engine, prompts = engine_of(talkative(), 5), make_prompts([5, 5, 5, 5])
    plain = SamplingParams(12, n=2, ignore_eos=True)
    ways = [plain, replace(plain, temperature=0), replace(plain, top_k=5)]
    for way in ways[:2] * 2:
        generated(engine, way, prompts)
    captured = engine.fake.captured
    generated(engine, replace(plain, n=4), prompts[:2])  # as the first, but for the number of responses
    assert engine.fake.captured == captured
    generated(engine, ways[2], prompts)  # in the place of greedy's
    captured = engine.fake.captured
    generated(engine, ways[0], prompts)
    assert engine.fake.captured == captured
    generated(engine, ways[1], prompts)
    assert engine.fake.captured > captured


def test_more_rows_longer_prompts_and_moved_weights_make_another_decoder() -> None:
    model = talkative()
    engine = engine_of(model, 5)
    generated(engine, SAMPLING, make_prompts([3, 4]))
    small = engine.decoder
    generated(engine, SAMPLING, make_prompts([2]))
    assert engine.decoder is small, "less is no reason"
    for prompts in (make_prompts([3, 70]), make_prompts([3] * 9)):
        engine.max_num_seqs = 5 * len(prompts)
        alike(
            generated(engine_of(model, kind=NativeEngine), SAMPLING, prompts),
            generated(engine, SAMPLING, prompts),
        )
        assert engine.decoder is not small
        small = engine.decoder
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone())
    generated(engine, SAMPLING, make_prompts([3]))
    assert engine.decoder is not small


def test_a_cache_that_grows_is_captured_anew() -> None:
    model = talkative()
    engine = engine_of(model, 24)
    right = generated(engine_of(model, kind=NativeEngine), SAMPLING)
    alike(right, generated(engine, SAMPLING))
    grown, captured = engine.decoder.pages.count, engine.fake.captured
    alike(right, generated(engine, SAMPLING))
    captured = engine.fake.captured
    alike(right, generated(engine, SAMPLING))
    assert (engine.decoder.pages.count, engine.fake.captured) == (grown, captured)


def pages_for(monkeypatch: pytest.MonkeyPatch, engine: Any, most: int) -> None:
    """Memory for so many pages."""

    def free_bytes(device: torch.device) -> float:
        pages = engine.decoder.pages
        return (most - pages.count) * pages.bytes_each

    monkeypatch.setattr("seqrl.rollout.pages.free_bytes", free_bytes)


@pytest.mark.parametrize("most", [14, 20, 40])
def test_where_memory_is_short_fewer_are_decoded_at_once(
    most: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that were put back begin anew, and draw the same."""
    model = talkative()
    right = generated(engine_of(model, kind=NativeEngine), SAMPLING)
    engine = engine_of(model, 24)
    pages_for(monkeypatch, engine, most)
    with caplog.at_level(logging.WARNING, logger="seqrl.rollout"):
        alike(right, generated(engine, SAMPLING))
    assert engine.decoder.pages.count <= most
    all_given_back(engine.decoder)
    assert len(caplog.messages) == 1 and "max_num_seqs=" in caplog.messages[0]


def test_where_there_is_no_memory_for_one_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(talkative(), 24)
    pages_for(monkeypatch, engine, 8)
    with pytest.raises(UserError, match=r"data\.max_prompt_length.*a prompt of 64 tokens"):
        generated(engine, SAMPLING, make_prompts([64]))
    long = SamplingParams(max_new_tokens=60, ignore_eos=True)
    with pytest.raises(UserError, match=r"data\.max_response_length=60.*response of \d+ tokens"):
        generated(engine, long, make_prompts([20]))


def test_numbers_of_rows_that_are_filled_up() -> None:
    numbers = [filled_number(n) for n in range(1, 400)]
    assert sorted({*numbers}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(n <= filled <= max(1.5 * n, n) for n, filled in enumerate(numbers, start=1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_attention_over_pages(heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, size, columns = [1, 8, 9, 31], 16, 8
    q = torch.randn(4, heads, size, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 30, columns, kv_heads, size, generator=generator, dtype=torch.float64)
    table = torch.randperm(30, generator=generator)[:16].view(4, 4).int()
    made = attend_pages(q, keys, values, table, torch.tensor(lengths, dtype=torch.int32))
    for row, length in enumerate(lengths):
        k, v = (
            x[table[row].long()].flatten(0, 1)[:length].repeat_interleave(heads // kv_heads, 1)
            for x in (keys, values)
        )
        share = (torch.einsum("hd,chd->hc", q[row], k) / size**0.5).softmax(-1)
        torch.testing.assert_close(made[row], torch.einsum("hc,chd->hd", share, v).flatten())


@pytest.mark.parametrize(("heads", "splits"), [(4, None), (2, 1)])
def test_what_flash_attention_is_asked(
    heads: int, splits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signature in torch: a call that does not fit raises."""
    import inspect

    from torch.nn.attention import varlen

    asked: dict[str, Any] = {}
    signature = inspect.signature(varlen.varlen_attn)

    def take(*arguments: Any, **options: Any) -> Tensor:
        asked.update(signature.bind(*arguments, **options).arguments)
        return asked["query"]

    monkeypatch.setattr(varlen, "varlen_attn", take)
    q, keys, table = torch.ones(3, heads, 8), torch.ones(9, 256, 2, 8), torch.zeros(3, 5, dtype=torch.int32)
    lengths, rows = torch.ones(3, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    assert attend_pages(q, keys, keys, table, lengths, rows).shape == (3, heads * 8)
    assert (asked["max_q"], asked["max_k"], asked["num_splits"]) == (1, 5 * 256, splits)
    assert "window_size" not in asked and asked["enable_gqa"] == (heads != 2)
    assert asked["seqused_k"] is lengths and asked["block_table"] is table and asked["cu_seq_q"] is rows
