"""Real processes, real signals: whatever happens to a run, its continuation ends bit for bit where a run
that nothing happened to ends.

A moment is found from outside, by what lies in the run's directory: the process is stopped (SIGSTOP), the
moment looked at again while nothing can move, and only then the process killed, or let go on to the next
such moment. All runs start together, since most of their time is the start of Python.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

STEPS = 7
SAVE_EVERY = 2
PATIENCE = 240
"""Seconds until a run counts as stuck."""

# What of a checkpoint says how the run went; the state's files also hold generators nobody drew from.
BIT_IDENTICAL = ("model.safetensors", "optimizer.safetensors", "huggingface/model.safetensors")


def start(arguments: Sequence[str], module: str = "seqrl.cli") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_to_the_end(arguments: Sequence[str], module: str = "seqrl.cli") -> None:
    process = start(arguments, module)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def steps_done(run_dir: Path) -> int:
    return rows(run_dir)[-1]["step"] if rows(run_dir) else 0


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step_")) for path in run_dir.glob("global_step_*"))


def unfinished(run_dir: Path) -> list[Path]:
    return list(run_dir.glob(".tmp-global_step_*"))


# Moments


def early(run_dir: Path) -> bool:
    """A step is done, and nothing saved yet."""
    return steps_done(run_dir) == 1 and not checkpoints(run_dir) and not unfinished(run_dir)


def in_a_step(run_dir: Path) -> bool:
    """Past a checkpoint and the step after it, so that the kill costs a finished step and a begun one."""
    saved = checkpoints(run_dir)
    return bool(saved) and steps_done(run_dir) == saved[-1] + 1 and not unfinished(run_dir)


def in_a_save(run_dir: Path) -> bool:
    """Of a checkpoint that is not the first, so that there is one to go on from."""
    return bool(unfinished(run_dir)) and bool(checkpoints(run_dir))


def stop_at(process: subprocess.Popen[str], run_dir: Path, moment: Callable[[Path], bool]) -> None:
    """Returns with the process stopped at such a moment."""
    deadline = time.monotonic() + PATIENCE
    while True:
        while not moment(run_dir):
            assert process.poll() is None, f"ended before {moment.__name__}: {process.communicate()[1]}"
            assert time.monotonic() < deadline, f"never reached {moment.__name__}"
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"ended before {moment.__name__}"
        if moment(run_dir):
            return
        process.send_signal(signal.SIGCONT)


def kill_at(process: subprocess.Popen[str], run_dir: Path, moment: Callable[[Path], bool]) -> None:
    stop_at(process, run_dir, moment)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert moment(run_dir), "what the dead process left behind says another moment"


# Lives of a run


def killed(arguments: Sequence[str], run_dir: Path, moment: Callable[[Path], bool]) -> Path:
    kill_at(start(arguments), run_dir, moment)
    run_to_the_end(arguments)
    return run_dir


def asked_to_stop(arguments: Sequence[str], run_dir: Path) -> Path:
    """By SIGTERM, gone on with, by Ctrl-C, gone on with."""
    for number in (signal.SIGTERM, signal.SIGINT):
        before = steps_done(run_dir)
        process = start(arguments)
        while steps_done(run_dir) == before:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert errors == ""
        step = steps_done(run_dir)
        assert before < step < STEPS
        assert checkpoints(run_dir)[-1] == step, "the step at hand is finished and saved"
        again = re.search(
            rf"^{number.name}: step {step} is finished and saved; go on with: (.*)$", output, re.M
        )
        assert again, output
        assert shlex.split(again[1]) == ["seqrl", *arguments]
    run_to_the_end(arguments)
    return run_dir


@pytest.fixture(scope="module")
def lives(
    train_arguments: Callable[..., list[str]], reward_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    home = tmp_path_factory.mktemp("lives")

    def arguments(run_dir: Path) -> list[str]:
        return train_arguments(
            run_dir,
            custom_reward_function__path=reward_file,
            data__val_files="chained_arithmetic:?size=4&split=test",
            actor_rollout_ref__actor__shuffle="true",
            actor_rollout_ref__actor__use_kl_loss="true",  # the reference must not move on resume
            actor_rollout_ref__actor__optim__lr_scheduler_type="cosine",
            trainer__total_training_steps=STEPS,
            trainer__save_freq=SAVE_EVERY,
            trainer__test_freq=3,
            trainer__max_actor_ckpt_to_keep=2,
        )

    def uninterrupted(run_dir: Path) -> Path:
        """Under verl's name, which is thereby shown to be the same program."""
        run_to_the_end(arguments(run_dir)[1:], module="seqrl.trainer.main_ppo")
        return run_dir

    with ThreadPoolExecutor(max_workers=3) as pool:
        yield {
            "uninterrupted": pool.submit(uninterrupted, home / "uninterrupted"),
            "asked": pool.submit(asked_to_stop, arguments(home / "asked"), home / "asked"),
        } | {
            moment.__name__: pool.submit(
                killed, arguments(home / moment.__name__), home / moment.__name__, moment
            )
            for moment in (early, in_a_step, in_a_save)
        }


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("timing_", "perf/"))}


def assert_ended_alike(run_dir: Path, reference: Path) -> None:
    ends = [path / f"global_step_{STEPS}" for path in (run_dir, reference)]
    for name in BIT_IDENTICAL:
        ours, theirs = ((end / name).read_bytes() for end in ends)
        assert ours == theirs, f"{name} differs from that of the run never interrupted"
    sampler, other = (json.loads((end / "state.json").read_text())["sampler"] for end in ends)
    assert sampler == other
    assert [without_times(row) for row in rows(run_dir)] == [without_times(row) for row in rows(reference)]
    assert (run_dir / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    assert not unfinished(run_dir)


def test_the_uninterrupted_run_trains(lives: dict[str, Future[Path]]) -> None:
    """Else the tests below would compare nothing with nothing."""
    run_dir = lives["uninterrupted"].result()
    history = rows(run_dir)
    assert [row["step"] for row in history] == list(range(STEPS + 1))
    assert all(row["actor/grad_norm"] > 0.01 for row in history[1:])
    assert [row["step"] for row in history if "val/accuracy" in row] == [0, 3, 6, 7]
    assert checkpoints(run_dir) == [6, 7]
    first, last = (run_dir / f"global_step_{step}" / "model.safetensors" for step in (6, 7))
    assert first.read_bytes() != last.read_bytes()


@pytest.mark.parametrize("moment", ["early", "in_a_step", "in_a_save"])
def test_killed_and_started_again_it_ends_bit_identical(lives: dict[str, Future[Path]], moment: str) -> None:
    assert_ended_alike(lives[moment].result(), lives["uninterrupted"].result())


def test_stopped_by_sigterm_and_ctrl_c_and_gone_on_with_it_ends_bit_identical(
    lives: dict[str, Future[Path]],
) -> None:
    assert_ended_alike(lives["asked"].result(), lives["uninterrupted"].result())
