"""What seqrl's kernels set for a whole process, no peer gets: its side never loads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import rollout, update
from benchmarks.measure import Elsewhere
from benchmarks.models import write_model

WORK = rollout.Work(batch=1, new_tokens=2, lengths="equal", greedy=True)


def kernels_loaded() -> bool:
    build = sys.modules.get("seqrl.kernels.build")
    return build is not None and build.library.cache_info().currsize > 0


def test_the_kernels_are_loaded_beside_no_transformers(tmp_path: Path) -> None:
    directory = write_model("dense-3m", tmp_path)
    batch = update.Work("dense-3m", "float32", "equal", 1).batch()
    with Elsewhere() as ours, Elsewhere() as theirs:
        assert ours.side(rollout.seqrl_side, directory, "float32", WORK)() == 2
        assert theirs.side(rollout.generate_side, directory, "float32", WORK, None)() == 2
        updated = theirs.side(update.transformers_side, directory, torch.float32, batch)()
        assert updated.grad_norm > 0 and updated.step_seconds > 0
        assert ours.run(kernels_loaded)
        assert not theirs.run(kernels_loaded)


def test_they_do_not_come_with_what_is_imported_beside_trl() -> None:
    look = "import sys, benchmarks.step, seqrl.data.chained_arithmetic; print('seqrl.kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
