"""The algorithms stand on torch alone: anyone can take a file of theirs and read it by itself."""

import ast
import sys
from pathlib import Path

import pytest

import seqrl.algos

FILES = sorted(Path(seqrl.algos.__file__).parent.glob("*.py"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_but_torch_algos_and_the_standard_library(file):
    for module in imports(ast.parse(file.read_text())):
        top = module.partition(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or f"{module}.".startswith("seqrl.algos."), (
            module
        )
