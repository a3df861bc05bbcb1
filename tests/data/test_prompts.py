from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqrl.config.schema import DataConfig
from seqrl.data.prompts import load_prompts, overlap
from seqrl.errors import UserError

KEY = "data.train_files"


def load(files, tokenizer, **config):
    return load_prompts(files, tokenizer, DataConfig(**config), key=KEY)


def decoded(prompt, tokenizer):
    return tokenizer.decode(prompt.tokens)


def test_jsonl_row_becomes_a_prompt(jsonl, make_row, tokenizer):
    path = jsonl([make_row(), b"", make_row(prompt="2+2", extra_info=None)])
    first, second = load([path], tokenizer)
    assert first.uid == f"{path}:1" and second.uid == f"{path}:3"
    assert first.data_source == "openai/gsm8k"
    assert first.ground_truth == "2"
    assert first.extra_info == {"index": 7} and second.extra_info == {}
    assert decoded(first, tokenizer) == "<|user|>1+1<|assistant|>"
    assert decoded(second, tokenizer) == "<|user|>2+2<|assistant|>"
    assert second.messages == ({"role": "user", "content": "2+2"},)
    assert len(first.tokens) == 5 and isinstance(first.tokens, tuple)


def test_parquet_gives_the_same_prompts_as_jsonl(tmp_path, jsonl, make_row, tokenizer):
    rows = [
        make_row(),
        make_row(prompt=[{"role": "system", "content": "é"}, {"role": "user", "content": "3"}]),
    ]
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    ours, theirs = load([str(parquet)], tokenizer), load([jsonl(rows)], tokenizer)
    assert [p.uid for p in ours] == [f"{parquet}:1", f"{parquet}:2"]
    assert [(p.tokens, p.messages, p.ground_truth, p.extra_info) for p in ours] == [
        (p.tokens, p.messages, p.ground_truth, p.extra_info) for p in theirs
    ]


def test_parquet_nulls_of_other_rows_messages_are_left_out(tmp_path, make_row, tokenizer):
    path = tmp_path / "rows.parquet"
    named = make_row(prompt=[{"role": "user", "content": "1", "name": "ada"}])
    pq.write_table(pa.Table.from_pylist([named, make_row()]), path)
    prompts = load([str(path)], tokenizer)
    assert [sorted(p.messages[0]) for p in prompts] == [["content", "name", "role"], ["content", "role"]]


def test_columns_are_found_under_the_configured_names(jsonl, make_row, tokenizer):
    path = jsonl([make_row(prompt=None, data_source=None, question="5+5", kind="mine")])
    (prompt,) = load([path], tokenizer, prompt_key="question", reward_fn_key="kind")
    assert prompt.data_source == "mine" and decoded(prompt, tokenizer) == "<|user|>5+5<|assistant|>"


def test_home_directory_is_expanded(tmp_path, monkeypatch, jsonl, make_row, tokenizer):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = jsonl([make_row()])
    assert load(["~/rows.jsonl"], tokenizer)[0].uid == f"{path}:1"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"reward_model": None}, "no ground truth"),
        ({"reward_model": {"style": "rule"}}, "no ground truth"),
        ({"reward_model": {"ground_truth": None}}, "no ground truth"),
        ({"reward_model": "2"}, "`reward_model` must be a mapping, not str"),
        ({"extra_info": [1]}, "`extra_info` must be a mapping, not list"),
        ({"data_source": None}, "column `data_source` is missing or null.*data.reward_fn_key"),
        ({"data_source": 3}, "`data_source` must be a string, not int"),
        ({"prompt": None}, "column `prompt` is missing or null.*data.prompt_key"),
        ({"prompt": 3}, "`prompt` must be a list of chat messages or a string, not int"),
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": "  "}, "`prompt` is empty"),
        ({"prompt": ["hello"]}, "`prompt`, message 1 must be a mapping"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}, "message 2 has no `content`"),
        ({"prompt": [{"role": "user", "content": None}]}, "message 1 has no `content`"),
        ({"prompt": [{"role": "user", "content": ["a"]}]}, "message 1: `content` must be a string, not list"),
        ({"prompt": [{"role": "user", "content": ""}]}, "message 1: `content` is empty"),
        (
            {"prompt": [{"role": "judge", "content": "a"}]},
            "chat template of .* refuses `prompt`: unknown role judge",
        ),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(jsonl, make_row, tokenizer, columns, says):
    path = jsonl([make_row(), make_row(**columns)])
    with pytest.raises(UserError, match=says) as error:
        load([path], tokenizer)
    assert str(error.value).startswith(f"{path}:2 (line)")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        (b"[1]", "a list, not a JSON object"),
    ],
)
def test_a_broken_line_is_named(jsonl, make_row, tokenizer, line, says):
    path = jsonl([make_row(), line])
    with pytest.raises(UserError, match=re.escape(f"{path}:2 (line): {says}")):
        load([path], tokenizer)


def test_a_bad_parquet_row_is_named(tmp_path, make_row, tokenizer):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([make_row(), make_row(reward_model={"ground_truth": None})]), path)
    with pytest.raises(UserError, match=re.escape(f"{path}:2 (row, from 1): no ground truth")):
        load([str(path)], tokenizer)


def test_parquet_text_that_is_not_utf8_is_named(tmp_path, tokenizer):
    path = tmp_path / "rows.parquet"
    # A string column made from raw bytes: Arrow does not look at them until somebody reads.
    text = pa.Array.from_buffers(pa.binary(), 2, pa.array([b"ok", b"\xff"]).buffers()).view(pa.string())
    pq.write_table(pa.table({"prompt": text, "data_source": ["a", "a"]}), path)
    with pytest.raises(UserError, match=re.escape(f"{path}:")) as error:
        load([str(path)], tokenizer, prompt_key="prompt")
    assert "no ground truth" in str(error.value)  # row 1 is readable and comes first
    pq.write_table(pa.table({"prompt": text[1:], "data_source": ["a"]}), path)
    with pytest.raises(UserError, match=re.escape(f"{path}:1 (row, from 1): text that is not UTF-8")):
        load([str(path)], tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.parquet", b"not parquet at all", "not a readable Parquet file"),
        ("rows.parquet", b"", "not a readable Parquet file"),
        ("rows.jsonl", b"\n \n", "holds no rows"),
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.csv", b"a,b", "neither a .parquet nor a .jsonl file, nor a task"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, tokenizer, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        load([str(path)], tokenizer)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_parquet_and_a_cut_one(tmp_path, make_row, tokenizer):
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([make_row()])
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(UserError, match="holds no rows"):
        load([str(path)], tokenizer)
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load([str(path)], tokenizer)


def test_missing_file_names_key_and_path(tokenizer):
    with pytest.raises(UserError, match=r"^data.train_files: no file /nowhere/a.parquet"):
        load(["/nowhere/a.parquet"], tokenizer)


def test_a_source_listed_twice_is_refused_whatever_its_spelling(jsonl, make_row, tokenizer):
    path = Path(jsonl([make_row()]))
    with pytest.raises(UserError, match="listed twice"):
        load([str(path), str(path.parent / "." / ".." / path.parent.name / path.name)], tokenizer)


def test_messages_need_a_chat_template_and_plain_strings_do_not(jsonl, make_row, tokenizer):
    tokenizer.chat_template = None
    tokenizer.name_or_path = "org/base"
    with pytest.raises(UserError, match="tokenizer of org/base has no chat template"):
        load([jsonl([make_row()])], tokenizer)
    (prompt,) = load([jsonl([make_row(prompt="1+1=")])], tokenizer)
    assert decoded(prompt, tokenizer) == "1+1="


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [("left", "6789<|assistant|>"), ("right", "<|user|>0123"), ("middle", "<|user|>089<|assistant|>")],
)
def test_truncation_keeps_the_end_the_beginning_or_both(jsonl, make_row, tokenizer, caplog, truncation, kept):
    path = jsonl([make_row(prompt="0123456789"), make_row(prompt="012")])
    with caplog.at_level(logging.WARNING):
        cut, whole = load([path], tokenizer, max_prompt_length=5, truncation=truncation)
    assert decoded(cut, tokenizer) == kept and len(cut.tokens) == 5
    assert decoded(whole, tokenizer) == "<|user|>012<|assistant|>"
    assert [r.getMessage() for r in caplog.records] == [
        "data.train_files: cut 1 of 2 prompts longer than 5 tokens"
    ]


def test_middle_truncation_of_an_odd_length(jsonl, make_row, tokenizer):
    (prompt,) = load(
        [jsonl([make_row(prompt="0123456789")])], tokenizer, max_prompt_length=7, truncation="middle"
    )
    assert decoded(prompt, tokenizer) == "<|user|>01789<|assistant|>"


def test_overlong_prompt_is_refused_by_default(jsonl, make_row, tokenizer):
    path = jsonl([make_row(), make_row(prompt="0123456789")])
    with pytest.raises(UserError, match=re.escape(f"{path}:2 (line): the prompt is 12 tokens")):
        load([path], tokenizer, max_prompt_length=11)
    assert len(load([path], tokenizer, max_prompt_length=12)) == 2


def test_unknown_truncation_is_refused(jsonl, make_row, tokenizer):
    with pytest.raises(UserError, match=r"data\.truncation=ends is not known"):
        load([jsonl([make_row()])], tokenizer, max_prompt_length=2, truncation="ends")


def test_filtering_drops_and_counts(jsonl, make_row, tokenizer, caplog):
    path = jsonl([make_row(prompt="0123456789"), make_row(), make_row(prompt="9876543210")])
    config = {"filter_overlong_prompts": True, "max_prompt_length": 5}
    with caplog.at_level(logging.WARNING):
        (prompt,) = load([path], tokenizer, **config)
    assert prompt.uid == f"{path}:2"
    assert [r.getMessage() for r in caplog.records] == [
        "data.train_files: dropped 2 of 3 prompts longer than 5 tokens"
    ]
    with pytest.raises(UserError, match=r"all 3 prompts are longer than data.max_prompt_length=4"):
        load([path], tokenizer, filter_overlong_prompts=True, max_prompt_length=4)


def test_no_files_no_prompts(tokenizer):
    assert load([], tokenizer) == []


def test_overlap_counts_held_out_prompts_seen_in_training(jsonl, make_row, tokenizer):
    train = load([jsonl([make_row(prompt=p) for p in "abc"], "train.jsonl")], tokenizer)
    val = load([jsonl([make_row(prompt=p) for p in "xbbc"], "val.jsonl")], tokenizer)
    assert overlap(train, val) == 3
    assert overlap(train, val[:1]) == 0


def test_extra_info_of_a_task_survives_json(tokenizer):
    (prompt,) = load(["reasoning_gym:chain_sum?size=1"], tokenizer)
    info = json.loads(json.dumps(prompt.extra_info))
    assert info["task"] == "chain_sum" and info["config"] == {"seed": 0, "size": 1}
    assert info["entry"]["answer"] == prompt.ground_truth
