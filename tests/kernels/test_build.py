"""Compiling on first use: where the result goes, when it is made anew, and what is said where it cannot be.

Most tests run a copy of build.py beside a source that has every function and does nothing, which compiles in
no time and needs no torch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path
from types import ModuleType

import pytest

from seqrl.kernels import build

# Not where the sources do not compile: all tests of the kernels would pass by.
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / "seqrl"


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder of such a copy."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "build.py").write_text(Path(build.__file__).read_text())
    (room / "all.h").write_text("/* nothing */\n")
    functions = "".join(f"void {name}(void) {{}}\n" for name in loaded(room).ARGUMENTS)
    (room / "all.c").write_text(f'#include "all.h"\n{functions}')
    return room


def loaded(room: Path) -> ModuleType:
    """The copy, as another process would have it."""
    spec = importlib.util.spec_from_file_location("seqrl.kernels.build", room / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler(folder: Path, script: str) -> str:
    """A compiler of our own: a shell script."""
    path = folder / "my-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_real_sources_compile_into_the_cache(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = build.library.__wrapped__()
    assert isinstance(made, CDLL)
    (file,) = cache.iterdir()
    assert file.name.startswith("kernels-") and file.suffix == ".so" and made._name == str(file)
    assert not warnings(caplog)


@pytest.mark.parametrize("processor", ["haswell", "skylake-avx512", "sapphirerapids"])
def test_the_real_sources_are_c_for_other_processors(processor: str) -> None:
    """What is in them for AVX2, for AVX-512 and for a matrix unit; here the compiler sees one of these."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    command = [found, *build.FLAGS, f"-march={processor}", "-fsyntax-only", "-x", "c"]
    sources = sorted(map(str, Path(build.__file__).parent.glob("*.c")))
    if subprocess.run([*command, os.devnull], capture_output=True).returncode:
        pytest.skip("a compiler that does not know this processor")
    made = subprocess.run([*command, *sources], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_a_second_call_and_a_second_process_load_without_compiling(
    cache: Path, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CC", compiler(tmp_path, f'echo "$*" >> {log}; exec cc "$@"'))
    first = loaded(room)
    assert first.library() is not None and first.library() is first.library()
    (file,) = cache.iterdir()
    made = file.stat()
    assert loaded(room).library() is not None
    assert file.stat() == made
    compiled = [line for line in log.read_text().splitlines() if line != "--version"]
    assert len(compiled) == 1


def test_sources_flags_and_compiler_are_in_the_name(
    cache: Path, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> set[str]:
        return {file.name for file in cache.iterdir()}

    def another() -> bool:
        before = names() if cache.exists() else set()
        assert loaded(room).library() is not None
        return len(names() - before) == 1

    assert another() and not another()
    for name in ("all.c", "all.h"):
        (room / name).write_text((room / name).read_text() + "/* changed */\n")
        assert another()
    source = (room / "build.py").read_text()
    (room / "build.py").write_text(source.replace('"-O3"', '"-O2"'))
    assert another()
    monkeypatch.setenv("CC", compiler(tmp_path, '[ "$1" = --version ] && echo 99 || exec cc "$@"'))
    assert another()
    changed = loaded(room)
    monkeypatch.setattr(changed, "_processor", lambda: "another")
    before = names()
    assert changed.library() is not None and names() > before


def test_two_processes_at_once(cache: Path, room: Path) -> None:
    code = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('build', sys.argv[1])\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "sys.exit(module.library() is None)\n"
    )
    command = [sys.executable, "-S", "-c", code, str(room / "build.py")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert len(list(cache.iterdir())) == 1, "no scratch files stay"


def test_switched_off_without_a_word(
    cache: Path, room: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert loaded(room).library() is None
    assert not caplog.records and not cache.exists()


def test_no_compiler_is_one_warning(
    cache: Path, room: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    module = loaded(room)
    assert module.library() is None and module.library() is None
    (message,) = warnings(caplog)
    assert "no C compiler found" in message
    assert "gcc or clang" in message and f"{build.SWITCH}=0" in message


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            '[ "$1" = --version ] || { echo "all.c:1: no such luck" >&2; echo more >&2; exit 1; }',
            "no such luck",
        ),
        ("exit 3", "exit status 3"),
        ("echo >&2; exit 3", "exit status 3"),  # an empty line is all it says
    ],
)
def test_a_compiler_that_fails_is_told_by_its_first_line(
    cache: Path,
    room: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str,
    reason: str,
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert loaded(room).library() is None
    (message,) = warnings(caplog)
    assert reason in message and "more" not in message.split("torch")[0]
    assert not list(cache.rglob("*")), "nothing half made stays"


def test_a_cache_that_cannot_be_written_is_a_warning(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(build.SWITCH, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert loaded(room).library() is None
    (message,) = warnings(caplog)
    assert str(tmp_path / "file") in message


def test_no_home_is_a_warning(
    room: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container may run as a user that the system does not know."""
    monkeypatch.delenv(build.SWITCH, raising=False)
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert loaded(room).library() is None
    (message,) = warnings(caplog)
    assert "home" in message


@pytest.mark.skipif(not hasattr(CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_taken_again() -> None:
    """Of blocks as large as those of a layer, after a few rounds no page is new."""
    code = """
import resource, torch
from seqrl.kernels import build
assert build.library() is not None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(12)])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(int, run.stdout.split()[-3:])) < 1000
