"""The benchmark of a GPU from end to end, here on a CPU and very small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cuda


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", *arguments])
    cuda.main()


def test_it_measures_and_writes_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "agreement", lambda *_: dict.fromkeys(cuda.FURTHEST, 0.0))
    run(monkeypatch, "--tiny", "--device", "cpu", "--turns", "1", "--profile", "--out", str(tmp_path))
    written = (tmp_path / "cuda.md").read_text()
    assert all(part in written for part in ("| update |", "| forward |", "| yes |", "| no |"))
    assert json.loads((tmp_path / "cuda.json").read_text())["numbers"]["of measured peak"] > 1e8
    assert {path.name for path in tmp_path.glob("*profile.txt")} == {
        "cuda-update-profile.txt",
        "cuda-decode-profile.txt",
    }


def test_all_sides_agree_in_float32() -> None:
    far = cuda.agreement(torch.device("cpu"), torch.float32)
    assert far.keys() == cuda.FURTHEST.keys()
    assert all(distance < 1e-4 for distance in far.values()), far


def test_what_does_not_agree_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "agreement", lambda *_: {**dict.fromkeys(cuda.FURTHEST, 0.0), "graphs": 1.0})
    with pytest.raises(SystemExit, match="graphs do not agree"):
        run(monkeypatch, "--tiny", "--device", "cpu", "--out", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no GPU" in line


def test_the_bound_of_decoding() -> None:
    """Two steps of two rows: the weights twice, and the columns that each row has in each step."""

    class Model:
        config = type("C", (), {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 4})

        def parameters(self) -> list[torch.Tensor]:
            return [torch.zeros(5, 7), torch.zeros(9)]

    work: Any = cuda.Work({}, 0, 0, 0, rows=2, decode_prompt=10, new_tokens=3)
    column = 2 * 2 * 3 * 2 * 4  # keys and values, two bytes, layers, heads, head size
    assert cuda.decode_bytes(Model(), work) == 2 * 2 * 35 + 2 * column * (11 + 12)
