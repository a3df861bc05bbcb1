"""What a judge may do to the runner, and what becomes of the sample."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from seqrl.config.schema import CodeRewardConfig
from seqrl.errors import UserError
from seqrl.reward import Reward
from seqrl.rewards.runner import Runner, Task

JUDGE = """
import ctypes, os, signal, subprocess, sys, threading, time
calls = 0

def judge(data_source, solution_str, ground_truth, extra_info):
    global calls
    calls += 1
    kind = solution_str.split()[0]
    if kind in globals():
        return globals()[kind](extra_info)
    return float(solution_str == ground_truth)

def count(_): return calls
def pid(_): return os.getpid()
def hang(_):
    while True: pass
def sleep(info): time.sleep(info["seconds"]); return 1
def stop(_): os.kill(os.getpid(), signal.SIGSTOP)
def leave(_): os._exit(0)
def sys_exit(_): sys.exit(0)
def interrupt(_): raise KeyboardInterrupt
def segfault(_): ctypes.string_at(0)
def boom(_): raise ValueError("boom")
def nan(_): return float("nan")
def none(_): return None
def allocate(_):
    kept = []
    while True: kept.append(bytearray(10_000_000))
def recurse(_): return recurse(_)
def overflow_the_stack(_):
    sys.setrecursionlimit(10**9)
    text = "[" * 10**6
    class A:
        def __getattr__(self, name): return getattr(self, name + "x")
    A().x
def close_all(_): os.closerange(0, 1000); return 1
def garbage(_):
    for fd in range(3, 50):
        try: os.write(fd, b"\\xff" * 4096)
        except OSError: pass
    return 1
def printing(_):
    for out in (1, 2): os.write(out, b'{"rewards": [{"value": 1}]}')
    print("score: 1"); sys.stdout.flush()
    return 0
def fork(_):
    os.fork()
    return 1
def fork_and_stay(info):
    if not os.fork():
        open(info["file"], "w").write(str(os.getpid()))
        time.sleep(1000)
    time.sleep(0.2)
    return 1
def daemon(info):
    if not os.fork():
        os.setsid()
        if not os.fork():
            open(info["file"], "w").write(str(os.getpid()))
            time.sleep(1000)
        os._exit(0)
    hang(info)
def program(info):
    child = subprocess.Popen(["sleep", "1000"])
    open(info["file"], "w").write(str(child.pid))
    child.wait()
def late_exit(_):
    threading.Thread(target=lambda: (time.sleep(0.02), os._exit(3))).start()
    return 1
def kill_parent(_): os.kill(os.getppid(), signal.SIGKILL); time.sleep(10)
def descriptors(_):
    import stat
    # the listing itself has one open; sockets, pipes and files of the trainer would show here
    return len([fd for fd in os.listdir("/proc/self/fd") if int(fd) > 2]) - 1
def stdin(_): return len(sys.stdin.read())
def mutate(info): return info.pop("weight")
def shape(info): return isinstance(info["tuple"], tuple)
def torch_loaded(_): return "torch" in sys.modules
def needs_torch(_):
    import torch
    return torch.ones(1000).sum().item()
"""

CODE = CodeRewardConfig()


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "r1.py"
    path.write_text(JUDGE)
    return f"{path}:judge"


def make(*judges, **changes):
    settings = {"workers": 2, "time_limit": 10.0, "memory_limit_mb": 512, "code": CODE, "arguments": {}}
    return Runner(judges, **{**settings, **changes})


@pytest.fixture(scope="module")
def runner(judge):
    with make(judge) as runner:
        yield runner


@pytest.fixture(scope="module")
def hasty(judge):
    with make(judge, time_limit=0.5) as runner:
        yield runner


serial = iter(range(10**9))


def task(judge, solution, truth="", **info):
    return Task(judge, solution, truth, {"serial": next(serial), **info}, "mine", f"q:{solution}")


def one(runner, judge, solution, **info):
    """Its reward; the samples around it come out right."""
    tasks = [task(judge, "x", "x"), task(judge, solution, **info), task(judge, "x", "y")]
    before, reward, after = runner.run(tasks)
    assert (before.value, after.value) == (1.0, 0.0) and not before.failed and not after.failed
    return reward


def gone(pid):
    """Ended, within a second."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


DEATHS = ["leave", "sys_exit", "interrupt", "segfault", "allocate", "recurse", "overflow_the_stack"]


@pytest.mark.parametrize("kind", [*DEATHS, "close_all", "garbage", "kill_parent"])
def test_a_judge_that_dies_takes_only_its_own_sample_with_it(runner, judge, kind):
    assert one(runner, judge, kind) == Reward(0.0, "crashed", failed=True)


def test_who_kills_the_zygote_is_found_among_many(runner, judge):
    """Whoever was at work then is judged again, alone; nobody else loses anything."""
    kinds = ["kill_parent" if i in (7, 40) else "sleep" if i % 2 else "x" for i in range(60)]
    rewards = runner.run([task(judge, kind, "x", seconds=0.01) for kind in kinds])
    assert [r.why for r in rewards] == ["crashed" if k == "kill_parent" else "scored" for k in kinds]


@pytest.mark.parametrize("kind", ["hang", "sleep", "stop", "daemon", "program"])
def test_a_judge_that_hangs_is_killed_at_its_limit(hasty, judge, kind, tmp_path):
    start = time.monotonic()
    assert one(hasty, judge, kind, seconds=100, file=str(tmp_path / "pid")) == Reward(
        0.0, "timed out", failed=True
    )
    assert 0.5 <= time.monotonic() - start < 3


@pytest.mark.parametrize("kind", ["daemon", "program", "fork_and_stay"])
def test_what_a_judge_has_started_ends_with_it(hasty, judge, kind, tmp_path):
    file = tmp_path / "pid"
    one(hasty, judge, kind, file=str(file))
    assert gone(int(file.read_text()))


def test_raising_is_told_with_its_line(runner, judge):
    reward = one(runner, judge, "boom")
    path = judge.rpartition(":")[0]
    line = JUDGE.splitlines().index('def boom(_): raise ValueError("boom")') + 1
    assert reward == Reward(0.0, f"raised: ValueError: boom ({path}:{line})", failed=True)


@pytest.mark.parametrize("kind", ["nan", "none"])
def test_what_is_no_number_is_told_with_what_it_was(runner, judge, kind):
    reward = one(runner, judge, kind)
    assert reward.failed and reward.value == 0
    assert reward.why.startswith("raised: judge of ")
    assert f"gave {kind.replace('none', 'None')}, not a finite number" in reward.why


@pytest.mark.parametrize(
    ("kind", "value"),
    [("printing", 0), ("fork", 1), ("late_exit", 1), ("descriptors", 1), ("stdin", 0), ("torch_loaded", 0)],
)
def test_nothing_of_the_trainer_is_within_reach(runner, judge, kind, value, capfd):
    assert one(runner, judge, kind) == Reward(value, "scored")
    assert capfd.readouterr() == ("", "")


def test_a_worker_killed_by_an_earlier_sample_costs_the_later_one_nothing(runner, judge):
    tasks = [task(judge, "late_exit" if i % 3 else "x", "x") for i in range(30)]
    assert [reward.value for reward in runner.run(tasks)] == [1.0] * 30


def test_values_arrive_as_they_are_and_cannot_be_changed(runner, judge):
    assert one(runner, judge, "shape", tuple=(1, 2)).value == 1
    info = {"weight": 2}
    first, second = runner.run([Task(judge, f"mutate {i}", "", info, "", "") for i in range(2)])
    assert (first.value, second.value, info) == (2.0, 2.0, {"weight": 2})


def test_torch_fits_beside_a_small_limit(judge):
    with make(judge, memory_limit_mb=1024, time_limit=60) as runner:
        assert one(runner, judge, "needs_torch").value == 1000


def test_workers_are_kept_from_sample_to_sample(runner, judge):
    pids = {r.value for _ in range(5) for r in runner.run([task(judge, "pid") for _ in range(50)])}
    assert 1 <= len(pids) <= 3


def test_order_is_kept(runner, judge):
    tasks = [task(judge, str(i), str(i if i % 3 else -1)) for i in range(500)]
    assert [reward.value for reward in runner.run(tasks)] == [float(i % 3 > 0) for i in range(500)]


def test_nothing_to_judge(runner, judge):
    assert runner.run([]) == [] and runner.run_batch(judge, []) == []


def test_large_samples_go_both_ways(runner, judge):
    text = "é" * 3_000_000
    assert [r.value for r in runner.run([task(judge, text, text) for _ in range(5)])] == [1.0] * 5


def test_built_in_verifiers_and_rows_nobody_can_judge():
    with make("gsm8k") as runner:
        right = Task("gsm8k", "#### 42", "42", {}, "openai/gsm8k", "a:0")
        bad = [Task("gsm8k", "#### 4", f"forty-{i}", {}, "openai/gsm8k", f"a:{i}") for i in (1, 2)]
        (reward,) = runner.run([right])
        assert (reward.value, reward.why, reward.failed) == (1.0, "right", False)
        with pytest.raises(UserError, match=r"^sample a:1: .*forty-1"):
            runner.run([right, *bad])
        assert runner.run([right] * 3) == [reward] * 3


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("mth", "no verifier 'mth'; did you mean math?"),
        ("zzzzzz", "no verifier 'zzzzzz'; there are .*gsm8k"),
        ("/nowhere/r.py:f", "custom_reward_function.path: no file /nowhere/r.py; check the path"),
        ("no_such_module_at_all:f", "no module no_such_module_at_all"),
    ],
)
def test_an_unknown_judge_is_refused_at_once(judge, says):
    with pytest.raises(UserError, match=says):
        make(judge)


def test_a_cached_reward_is_not_judged_again(judge):
    with make(judge, workers=1) as runner:
        tasks = [Task(judge, "count", "", {"i": i}, "", f"u{i}") for i in range(3)]
        first = runner.run(tasks)
        assert sorted(r.value for r in first) == [1, 2, 3] and runner.cache_hits == 0
        assert runner.run(tasks) == first and runner.cache_hits == 3
        (other,) = runner.run([Task(judge, "count", "", {"i": 3}, "", "u0")])
        assert other.value == 4 and runner.cache_hits == 3


def test_a_failure_is_not_cached(judge):
    with make(judge, workers=1) as runner:
        bad = Task(judge, "boom", "", {}, "", "u")
        assert [runner.run([bad])[0].why[:6] for _ in range(2)] == ["raised"] * 2
        assert runner.cache_hits == 0 and runner.run([Task(judge, "count", "", {}, "", "u")])[0].value == 3


def test_the_cache_is_bounded():
    from seqrl.rewards.runner import Cache

    cache = Cache(3, 10**6)
    for i in range(5):
        cache.put(bytes([i]), Reward(i, ""))
        cache.get(b"\2")
    assert [cache.get(bytes([i])) is not None for i in range(5)] == [False, False, True, True, True]
    small = Cache(100, 10_000)
    for i in range(10):
        small.put(bytes([i]), Reward(i, "", answer="x" * 1000))
    assert [small.get(bytes([i])) is not None for i in range(10)] == [False] * 8 + [True] * 2


def test_a_batch_is_one_call(tmp_path):
    path = tmp_path / "batch.py"
    path.write_text(
        textwrap.dedent(
            """
            import time
            def score(data_sources, solution_strs, ground_truths, extra_infos, bonus=0):
                if "hang" in solution_strs: time.sleep(100)
                if "exit" in solution_strs: raise SystemExit
                if "short" in solution_strs: return [1]
                if "bad" in solution_strs: return [1, None]
                return [{"score": a == b, "n": len(extra_infos) + bonus}
                        for a, b in zip(solution_strs, ground_truths)]
            """
        )
    )
    judge = f"{path}:score"
    with make(judge, time_limit=0.3, arguments={"bonus": 10}) as runner:

        def whys(*solutions):
            return [r.why for r in runner.run_batch(judge, [task(judge, s, "b") for s in solutions])]

        rewards = runner.run_batch(judge, [task(judge, s, "b") for s in "abc"])
        assert rewards == [Reward(float(s == "b"), "scored", {"n": 13.0}) for s in "abc"]
        assert whys("a", "exit") == ["crashed"] * 2
        assert all("gave 1 rewards for 2 responses" in why for why in whys("a", "short"))
        assert all("sample q:bad: score of " in why for why in whys("a", "bad"))
        start = time.monotonic()
        assert whys("a", "b", "hang") == ["timed out"] * 3
        assert 0.9 <= time.monotonic() - start < 2
        with pytest.raises(UserError, match="cannot be called with data_source, solution_str"):
            runner.run([task(judge, "a")])


def test_hanging_samples_wait_side_by_side(judge):
    with make(judge, time_limit=1.0) as runner:
        runner.run([task(judge, "x") for _ in range(100)])  # it knows how long a sample takes
        tasks = [task(judge, "sleep" if i % 20 == 0 else "x", "x", seconds=100) for i in range(240)]
        start = time.monotonic()
        rewards = runner.run(tasks)
        assert time.monotonic() - start < 4  # one after the other on two workers: 6 s
    assert [r.why for r in rewards] == ["timed out" if i % 20 == 0 else "scored" for i in range(240)]


def test_a_judge_that_is_always_slow_has_its_time(judge):
    """All take longer than the patience: none loses its place."""
    with make(judge, time_limit=2) as runner:
        tasks = [task(judge, "sleep", seconds=0.2) for _ in range(10)]
        assert {r.why for r in runner.run(tasks)} == {"scored"}
        assert max(r.value for r in runner.run([task(judge, "count") for _ in range(2)])) >= 5


def test_an_interrupt_leaves_nothing_behind(judge):
    with make(judge, workers=1) as runner:
        runner.run([task(judge, "x")])

        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                runner.run([task(judge, "sleep", seconds=100)])
        finally:
            signal.signal(signal.SIGALRM, before)
        assert one(runner, judge, "fork").value == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_close_ends_all_and_may_be_repeated(judge):
    def children():
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    before = children()
    runner = make(judge)
    assert children() != before
    pids = [int(r.value) for r in runner.run([task(judge, "pid") for _ in range(20)])]
    runner.close()
    runner.close()
    assert all(gone(pid) for pid in pids)
    assert children() == before  # no zombie either


SCRIPT = """
import os, sys, time
from seqrl.config.schema import CodeRewardConfig
from seqrl.rewards.runner import Runner, Task
code = CodeRewardConfig()
runner = Runner([JUDGE], workers=2, time_limit=60.0, memory_limit_mb=512, code=code, arguments={})
rewards = runner.run([Task(JUDGE, "pid", "", {"i": i}, "", "") for i in range(20)])
with open("pids", "w") as file:
    print(*{int(reward.value) for reward in rewards}, file=file)
"""


@pytest.mark.parametrize("end", ["forgets", "raises", "is killed", "closed descriptors", "killed at work"])
def test_the_trainer_may_end_as_it_likes(judge, tmp_path, end):
    last = {
        "forgets": "",
        "raises": "1 / 0",
        "is killed": "os.kill(os.getpid(), 9)",
        "closed descriptors": "",
        "killed at work": (
            "import threading\n"
            "threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()\n"
            "runner.run([Task(JUDGE, 'hang', '', {}, '', '')])"
        ),
    }[end]
    code = SCRIPT.replace("JUDGE", repr(judge)) + last
    command = [sys.executable, "-c", code]
    if end == "closed descriptors":
        command = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command]
    subprocess.run(command, cwd=tmp_path, stderr=subprocess.DEVNULL, timeout=60)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert pids and all(gone(pid) for pid in pids)


def test_functions_of_modules_in_the_working_directory(tmp_path):
    (tmp_path / "mymod.py").write_text("def f(data_source, solution_str, **rest): return len(solution_str)")
    code = SCRIPT.replace("JUDGE", repr("mymod:f"))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "pids").read_text() == "3\n"


def test_the_workers_modules_import_no_torch():
    code = "import sys, seqrl.rewards.runner, seqrl.rewards.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
