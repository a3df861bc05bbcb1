"""What runs on a matrix unit alone, on a processor without one: its instructions emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
_UNDER_TEST = (
    "kernels/test_tiles.py",
    "kernels/test_attention.py",
    "kernels/test_decoding_kernels.py",
    "native/test_blocks.py",
    "rollout/test_layers.py",
)
_INFO = Path("/proc/cpuinfo")


@pytest.mark.slow
@pytest.mark.skipif(
    not _INFO.exists() or "avx512_bf16" not in _INFO.read_text() or "amx_bf16" in _INFO.read_text(),
    reason="has a matrix unit, or nothing to emulate it with",
)
@pytest.mark.parametrize("tests", _UNDER_TEST)
def test_with_tiles_emulated(tests: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc here")
    header, wrapper = Path(__file__).with_name("tiles_emulated.h"), tmp_path / "cc"
    flags = f"-mamx-tile -mamx-bf16 -include {header}"
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {compiler} "$1"\nexec {compiler} {flags} "$@"\n'
    )
    wrapper.chmod(0o755)
    environment = os.environ | {"CC": str(wrapper), "XDG_CACHE_HOME": str(tmp_path)}
    has_tiles = "import torch, seqrl.kernels as k; assert k.has_tiles(torch.bfloat16, torch.device('cpu'))"
    subprocess.run([sys.executable, "-c", has_tiles], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_TESTS / tests)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=_TESTS.parent)
    assert ran.returncode == 0, ran.stdout[-4000:]
