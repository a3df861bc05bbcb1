"""The cache, attention over it, and the draw."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import BF16, ERROR, F32, near, random
from torch import Tensor

from seqrl.kernels import Cache, attend_cached, draw

pytestmark = pytest.mark.usefixtures("c_only")


def filled(
    columns: list[int], at_most: int, kv_heads: int, size: int, dtype: torch.dtype, seed: int
) -> tuple[Cache, Tensor, Tensor]:
    """A cache whose slot s has `columns[s]` columns; all else in it is no number, as fresh memory may be.
    And what was put in: keys and values [slots, columns, K, D]."""
    cache = Cache.of(len(columns), at_most, kv_heads, size, dtype)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    keys = random(len(columns), at_most, kv_heads, size, seed=seed)
    rows = random(len(columns), at_most, 3 * kv_heads, size, seed=seed + 1)  # values among other projections
    slot = torch.arange(len(columns)).repeat_interleave(torch.tensor(columns))
    column = torch.cat([torch.arange(count) for count in columns])
    values = rows[:, :, 2 * kv_heads :]
    cache.append(keys[slot, column].to(dtype), rows[slot, column].to(dtype)[:, 2 * kv_heads :], slot, column)
    return cache, keys, values


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(2, 2, 32), (4, 2, 64), (4, 1, 96), (8, 1, 128), (3, 1, 32), (20, 1, 32)]
)
def test_one_query_over_prompt_and_own_columns(
    threads: int, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> None:
    prompt_columns, own_columns = [1, 15, 16, 17, 100], [1, 16, 33, 2, 31, 7, 40]
    prompts, prompt_keys, prompt_values = filled(prompt_columns, 100, kv_heads, size, dtype, 1)
    own, own_keys, own_values = filled([n - 1 for n in own_columns], 40, kv_heads, size, dtype, 3)
    prompt, slot = torch.tensor([4, 4, 0, 1, 2, 3]), torch.tensor([6, 0, 1, 5, 3, 2])  # slot 4 is free
    q = random(len(slot), heads, size, seed=5)
    counts = torch.tensor(own_columns)[slot]
    newest = own_keys[slot, counts - 1].to(dtype), own_values.to(dtype)[slot, counts - 1]
    of_prompts = prompts, prompt, torch.tensor(prompt_columns)
    out = attend_cached(q.to(dtype), *newest, *of_prompts, own, slot, counts)
    assert out.dtype == dtype

    def exact(row: int) -> Tensor:
        p, s = int(prompt[row]), int(slot[row])
        keys, values = (
            torch.cat([x[p, : prompt_columns[p]], y[s, : own_columns[s]]]).double()
            for x, y in ((prompt_keys, own_keys), (prompt_values, own_values))
        )
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
        scores = torch.einsum("hd,chd->hc", q[row].double(), keys) / size**0.5
        return torch.einsum("hc,chd->hd", scores.softmax(-1), values).flatten()

    near([out], [torch.stack([exact(row) for row in range(len(slot))])], ERROR[dtype])


def test_append_writes_one_column_and_no_other() -> None:
    cache, _, _ = filled([20, 3], 40, 2, 32, F32, 1)
    before = Cache(cache.keys.clone(), cache.values.clone())
    cache.append(torch.ones(1, 2, 32), torch.ones(1, 2, 32), torch.tensor([1]), torch.tensor([17]))
    changed = (before.keys != cache.keys) & ~(before.keys.isnan() & cache.keys.isnan())
    expected = torch.zeros_like(changed)
    expected[1, :, 1, :, 1] = True
    assert torch.equal(changed, expected)
    changed = (before.values != cache.values) & ~(before.values.isnan() & cache.values.isnan())
    assert changed[1, :, 17].all() and changed.sum() == 2 * 32


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_attention_puts_the_newest_column_where_append_does(dtype: torch.dtype) -> None:
    """At the start of a step of columns, too, where all that follows is no number."""
    columns = [0, 15, 16, 31, 32, 33, 3]
    (own, _, _), (other, _, _) = (filled(columns, 40, 2, 32, dtype, 1) for _ in range(2))
    prompts, _, _ = filled([5], 16, 2, 32, dtype, 7)
    k, rows, slot = random(7, 2, 32, seed=2).to(dtype), random(7, 6, 32, seed=3).to(dtype), torch.arange(7)
    q, counts = random(7, 4, 32, seed=4).to(dtype), torch.tensor(columns) + 1
    attend_cached(q, k, rows[:, 4:], prompts, 0 * slot, torch.tensor([5]), own, slot, counts)
    other.append(k, rows[:, 4:], slot, counts - 1)
    for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_rows_without_a_place_write_nothing_and_get_nothing() -> None:
    """A step may be filled up to a round number of rows."""
    cache, _, _ = filled([20, 3], 40, 2, 32, F32, 1)
    prompts, _, _ = filled([20, 3], 40, 2, 32, F32, 4)
    before = cache.keys.clone()
    k, q, slot = random(6, 2, 32, seed=2), random(6, 4, 32, seed=3), torch.tensor([1, 0])
    cache.append(k, k, slot, torch.tensor([3, 20]))
    changed = (before != cache.keys) & ~(before.isnan() & cache.keys.isnan())
    assert changed.sum() == 2 * 2 * 32
    of_prompts, columns = (prompts, slot, torch.tensor([20, 3])), torch.tensor([5, 22])
    out = attend_cached(q, k, k, *of_prompts, cache, slot, columns)
    changed = (before != cache.keys) & ~(before.isnan() & cache.keys.isnan())
    assert changed.sum() == 2 * 2 * 2 * 32
    few = attend_cached(q[:2], k[:2], k[:2], *of_prompts, cache, slot, columns)
    assert out.shape == (6, 4 * 32)
    assert torch.equal(out[:2], few) and few.isfinite().all() and not out[2:].any()


def test_no_rows() -> None:
    cache, _, _ = filled([1], 16, 2, 32, F32, 1)
    none = torch.empty(0, dtype=torch.long)
    nothing = torch.empty(0, 2, 32)
    cache.append(nothing, nothing, none, none)
    out = attend_cached(
        torch.empty(0, 4, 32), nothing, nothing, cache, none, torch.tensor([1]), cache, none, none
    )
    assert out.shape == (0, 4 * 32)
    tokens, logprobs = draw(torch.empty(0, 61), 1.0, torch.empty(0, dtype=torch.float64))
    assert tokens.shape == logprobs.shape == (0,)


VOCABULARIES = [1, 7, 16, 61, 1000]  # below 16, 16, and no multiple of it


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_distribution(threads: int, vocabulary: int, temperature: float) -> None:
    draws = 20_000
    logits = 2 * random(vocabulary)
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws  # evenly, so that counts are exact
    tokens, logprobs = draw(logits.expand(draws, -1), temperature, uniforms)
    expected = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected[tokens], rtol=0, atol=3e-6)
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert (counts - draws * expected.exp()).abs().max() <= 1 + draws * 1e-5
    assert torch.equal(tokens, tokens.sort().values), "in vocabulary order"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 0.999999, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn_by_the_kernel(vocabulary: int, uniform: float) -> None:
    logits = 4 * random(64, vocabulary)
    kept = vocabulary // 2
    hidden = torch.arange(vocabulary) != kept
    hidden[vocabulary // 3 : kept] = False
    logits[:, hidden & (torch.arange(vocabulary) % 2 == 0)] = -torch.inf
    logits[:, hidden & (torch.arange(vocabulary) % 2 == 1)] = -1e4  # underflows
    tokens, logprobs = draw(logits, 1.0, torch.full((64,), uniform, dtype=torch.float64))
    assert not hidden[tokens].any()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[torch.arange(64), tokens], rtol=0, atol=3e-6)


def test_one_token_has_all() -> None:
    logits = torch.full((5, 20), -torch.inf)
    logits[torch.arange(5), torch.tensor([0, 3, 15, 16, 19])] = -7.0
    for uniform in (0.0, 0.999999):
        tokens, logprobs = draw(logits, 1.0, torch.full((5,), uniform, dtype=torch.float64))
        assert tokens.tolist() == [0, 3, 15, 16, 19]
        assert not logprobs.any()


def test_what_is_no_number_gives_none() -> None:
    """Broken weights show up as log-probs that are no number, not as a crash, and in their row alone."""
    logits = random(3, 61)
    clean = draw(logits, 1.0, torch.full((3,), 0.5, dtype=torch.float64))
    logits[1, 60] = torch.nan
    tokens, logprobs = draw(logits, 1.0, torch.full((3,), 0.5, dtype=torch.float64))
    assert 0 <= tokens[1] < 61 and logprobs[1].isnan()
    assert torch.equal(tokens[::2], clean[0][::2]) and torch.equal(logprobs[::2], clean[1][::2])
