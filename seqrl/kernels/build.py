"""Compiles the C files beside this one, once, and loads them.

They are plain C with OpenMP, without a header of torch, so that the system's compiler takes seconds; the
result is kept in the user's cache folder, under a name that says sources, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)

FLAGS = (
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-w",
)
_OF_ROWS = {
    "add_norm": "ll ppp f ppp",
    "add_norm_backward": "ll pppppppp l",
    "turn": "llll ppp f ppppp",
    "turn_backward": "llll ppp f ppppppppp l",
}
_OF_STORAGE = {
    "gate": "ll pp",
    "gate_backward": "ll ppp",
    "combine": "lll pppp",
    "combine_backward": "lll pppppp",
    "expert_products": "lll ppppp",
    "expert_backward_x": "lll pppp",
    "expert_backward_w": "lll ppppp",
    "append": "llll pp l pppp",
    "attend_cached": "llll ppp l pp l pppp l ppp",
    "attend_forward": "llll ppp l pppp l pp",
    "attend_backward": "llll ppp l pppppppp l ppp",
    "head_fold": "llll f ppppppp",
    "head_gradient": "llll f pppppppp l",
}
ARGUMENTS = {
    **{
        f"{name}_{types}": said
        for name, said in _OF_ROWS.items()
        for types in ("f32_f32", "f32_bf16", "bf16_bf16")
    },
    **{f"{name}_{type_}": said for name, said in _OF_STORAGE.items() for type_ in ("f32", "bf16")},
    "sort_pairs": "lll pppp",
    "expert_pack": "lll pp",
    "strip_products": "lllll pppp",
    "draw": "ll p f pp",
    "tiles_here": "",
    "tile_pack": "lll p lll pp",
    "tile_products": "llll pppppp",
    "tile_gradient": "llll pppp ll pp",
    "decode_layers": "p l p",
    **dict.fromkeys(
        ("attention_block", "attention_block_backward", "gated_block", "gated_block_backward"), "p"
    ),
}
"""What each function takes, in order: l a long, f a float, p a pointer."""
FAILING = (
    "attend_forward",
    "attend_backward",
    "draw",
    "expert_products",
    "expert_backward",
    "tile_products",
    "tile_gradient",
    "decode_layers",
    "attention_block",
    "gated_block",
)
"""How the names of functions begin that need scratch memory, and give back 1 where there is none."""
SWITCH = "SEQRL_KERNELS"
"""Environment variable: `0` leaves the kernels out, for a look at what torch's own operations give."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or no compiler is there, which is told once.

    With them the process keeps memory that it has freed, see `_keep_memory`.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        reason = (getattr(error, "stderr", None) or "").strip() or str(error)
        _log.warning(
            "kernels: the C kernels could not be compiled (%s); torch's own operations stand in, which are "
            "slower. gcc or clang, with OpenMP, makes up for it; %s=0 silences this",
            reason.splitlines()[0],
            SWITCH,
        )
        return None
    kinds = {"l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
    for name, said in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = [kinds[letter] for letter in said.replace(" ", "")]
        if not name.startswith((*FAILING, "tiles_here")):
            function.restype = None
    _keep_memory()
    return loaded


def _keep_memory() -> None:
    """Has the allocator reuse large blocks. glibc gives them back and gets them anew, page by page of zeros,
    which takes longer than a gate or a norm takes to fill them. Other C libraries are left as they are."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**31 - 1)


def _compiled() -> Path:
    """The shared library, compiled now if it is not in the cache."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        raise OSError("no C compiler found")
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    command = [compiler, *FLAGS, *_for_this_processor()]
    key = hashlib.sha256(repr((command, version, _processor())).encode())
    for file in (*sources, *sorted(folder.glob("*.h"))):
        key.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqrl"
    target = cache / f"kernels-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # another process may be at it, too
        made = Path(scratch) / target.name
        subprocess.run(
            [*command, "-o", str(made), *map(str, sources), "-lm"], capture_output=True, text=True, check=True
        )
        os.replace(made, target)
    return target


def _for_this_processor() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _processor() -> str:
    """What distinguishes processors that share a home directory."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
