"""The arrows of docs/architecture.md: which room imports which, read from the source.

Imports inside functions count as well. A room is a module or package directly under `seqrl`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "seqrl"

EVERYTHING = "everything"
BELOW = {"types", "reward", "errors", "config"}
TRAINER = BELOW | {
    "algos",
    "data.base",
    "rewards.base",
    "rollout.base",
    "training.base",
    "report",
    "checkpoint",
}
# What a room may import, besides itself: rooms, or `room.module` for that module alone.
ARROWS: dict[str, set[str] | str] = {
    "cli": EVERYTHING,
    "quickstart": EVERYTHING,
    "compare": EVERYTHING,
    "lab": EVERYTHING,
    "evaluate": EVERYTHING,
    "data_command": EVERYTHING,
    "check_command": {"config", "errors", "rewards.verifiers"},
    "explain_command": {"config", "errors", "check_command"},
    "trainer": TRAINER,
    "data": BELOW,
    "rewards": BELOW,
    "kernels": set(),
    "native": {"kernels"},
    "rollout": BELOW | {"native", "kernels"},
    "training": BELOW | {"algos", "native", "kernels"},
    "report": BELOW,
    "checkpoint": BELOW,
    "config": {"errors"},
    "types": {"reward"},
    "reward": set(),
    "algos": set(),
    "errors": set(),
    "tiny": {"errors"},
    "": set(),  # seqrl/__init__.py
}
# The same program under verl's name, `python -m seqrl.trainer.main_ppo`.
EXCEPTIONS = {("trainer.main_ppo", "cli")}
# Rooms that may use the standard library and these packages, no others.
PACKAGES = {
    "types": {"torch"},
    "algos": {"torch"},
    "kernels": {"torch"},
    "native": {"torch"},
    "errors": set(),
    "reward": set(),
    "": set(),
}


def violations(source: Path) -> list[str]:
    """Each import in the package at `source` that goes against an arrow, as `file:line: what`."""
    found = []
    for path in sorted(source.rglob("*.py")):
        module = _module(path, source)
        room = module.split(".")[0]
        if room not in ARROWS:
            found.append(f"{path.relative_to(source)}:1: {room} is in no room of docs/architecture.md")
            continue
        for line, target in _imports(path, source):
            if not _allowed(module, room, target):
                found.append(f"{path.relative_to(source)}:{line}: {room or 'seqrl'} imports {target}")
    return found


def _allowed(module: str, room: str, target: str) -> bool:
    package, _, inside = target.partition(".")
    if package != "seqrl":
        return room not in PACKAGES or package in PACKAGES[room] | sys.stdlib_module_names
    goal = inside.split(".")[0]
    allowed = ARROWS[room]
    if allowed == EVERYTHING or goal in (room, "") or (module, goal) in EXCEPTIONS:
        return True
    return goal in allowed or any(inside == name or inside.startswith(f"{name}.") for name in allowed)


def _module(path: Path, source: Path) -> str:
    """`rollout.base` for seqrl/rollout/base.py, `rollout` for its __init__, `` for the package's own."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, source: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted target of each import; `from package import module` names the module."""
    package = ["seqrl", *path.relative_to(source).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if _is_module(full, source) else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                (node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant)
            )


def _is_module(dotted: str, source: Path) -> bool:
    package, *parts = dotted.split(".")
    path = source.joinpath(*parts)
    return package == "seqrl" and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def test_every_import_follows_an_arrow() -> None:
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("path", "code", "told"),
    [
        (
            "rollout/native.py",
            "from seqrl.training.base import Engine",
            "1: rollout imports seqrl.training.base",
        ),
        ("data/a.py", "def f():\n    import seqrl.rewards", "2: data imports seqrl.rewards"),
        ("rewards/a.py", "from seqrl import report", "1: rewards imports seqrl.report"),
        ("rewards/a.py", "from ..data import prompts", "1: rewards imports seqrl.data.prompts"),
        (
            "rollout/a.py",
            "import importlib\nimportlib.import_module('seqrl.data')",
            "2: rollout imports seqrl.data",
        ),
        ("trainer/loop.py", "from seqrl.rollout.native import E", "1: trainer imports seqrl.rollout.native"),
        ("trainer/loop.py", "from seqrl.rollout import native", "1: trainer imports seqrl.rollout.native"),
        ("trainer/loop.py", "from seqrl.cli import main", "1: trainer imports seqrl.cli"),
        ("trainer/sft.py", "import seqrl.training.local", "1: trainer imports seqrl.training.local"),
        ("config/load.py", "from seqrl.types import Batch", "1: config imports seqrl.types"),
        ("algos/losses.py", "from seqrl.types import segment_sum", "1: algos imports seqrl.types"),
        ("algos/losses.py", "import numpy as np", "1: algos imports numpy"),
        ("types.py", "import transformers", "1: types imports transformers"),
        ("errors.py", "from seqrl.config import schema", "1: errors imports seqrl.config.schema"),
        ("utils.py", "", "1: utils is in no room of docs/architecture.md"),
    ],
)
def test_an_import_against_an_arrow_is_found(tmp_path: Path, path: str, code: str, told: str) -> None:
    _write(tmp_path, {path: code})
    assert violations(tmp_path) == [f"{path}:{told}"]


def test_imports_along_the_arrows_are_allowed(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "cli.py": "from seqrl.rollout.native import Engine\nimport seqrl.trainer.loop, rich",
            "trainer/loop.py": "from seqrl.rollout.base import Engine\nfrom seqrl.training import base\n"
            "from seqrl.report import console\nfrom seqrl import __version__, checkpoint",
            "trainer/main_ppo.py": "from seqrl.cli import main",
            "training/objective.py": "import math, torch\nfrom seqrl.algos.losses import LOSSES\n"
            "from . import base\nimport transformers",
            "algos/losses.py": "import math\nimport torch.nn\nfrom .kl import k3",
            "config/load.py": "import hydra\nfrom seqrl.errors import UserError",
        },
    )
    assert violations(tmp_path) == []


def _write(root: Path, extra: dict[str, str]) -> None:
    """A package with the modules that the codes of this file import, and `extra` over them."""
    modules = ["algos/kl", "rollout/native", "rollout/base", "training/base", "data/prompts"]
    empty = [
        f"{name}.py"
        for name in (*modules, "report/__init__", "report/console", "checkpoint", "config/schema")
    ]
    for name, code in {**dict.fromkeys(empty, ""), **extra}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code, encoding="utf-8")


@pytest.mark.skipif(not (SOURCE / "cli.py").is_file(), reason="seqrl/cli.py is not there")
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from seqrl.cli import main\n"
        "sys.argv = ['seqrl', '--help']\n"
        "try:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'hydra', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "assert not code and not heavy, (code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
