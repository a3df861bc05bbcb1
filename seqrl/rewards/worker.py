"""The processes that run verifiers. They import no torch, and trust nobody but the trainer.

The trainer starts one process, the *zygote*, which imports what the judges need, stays single-threaded, and
forks a worker in milliseconds whenever the trainer asks for one. A worker reads tasks from a socket of its
own, which only the trainer has the other end of, and writes verdicts as JSON. It may hang, exit, or be killed
at any moment: the trainer watches the clock and the socket, and the zygote does the killing, because the id
of a child cannot go to another process before its parent has waited for it.

Trainer to zygote: one frame with the setup (pickle), then commands. Zygote to trainer: one frame (JSON), then
for each worker its id, with its socket. Both directions of a worker's socket: frames, tied to a number.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from typing import BinaryIO, NoReturn

from seqrl.errors import UserError
from seqrl.rewards.judges import CRASHED, Judges, Task, to_json

FRAME = struct.Struct("!QI")
"""A number and the length of what follows, bytes."""
COMMAND = struct.Struct("!ci")
FORK, KILL = b"f", b"k"
"""`FORK, 0`: start a worker. `KILL, pid`: end this one and every process it has started."""
ANSWER = struct.Struct("!i")
"""A worker's process id, or -errno."""
LONGEST_VERDICT = 1 << 16
"""Bytes, for one task."""
TICK = 2.0
"""Seconds between looks at whether the trainer is still there; its socket tells sooner."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def main(control: int) -> None:
    """The zygote. `control` is its end of the trainer's socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's affair
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a user's module may take its time to import
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a worker leaves behind becomes a child of this process
    trainer = socket.socket(fileno=control)
    with trainer.makefile("rb") as reader:
        setup = pickle.loads(reader.read(FRAME.unpack(reader.read(FRAME.size))[1]))
    names = setup.pop("judges")
    judges = Judges(**setup)
    try:
        hello: dict[str, object] = {"versions": {name: judges.version(name) for name in names}}
    except UserError as error:
        hello = {"error": str(error)}
    except BaseException:
        hello = {"bug": traceback.format_exc()}
    _send(trainer, 0, hello)
    _prctl(PR_SET_PDEATHSIG, 0)  # it means the trainer's thread, which may end before the trainer does
    if "versions" in hello:
        judges.warm_up(names)
        gc.collect()
        gc.freeze()  # a worker's garbage collector need not touch, and so copy, what it shares
        Zygote(trainer, judges).run()


class Zygote:
    def __init__(self, trainer: socket.socket, judges: Judges) -> None:
        self._trainer, self._judges = trainer, judges
        self._pid, self._parent = os.getpid(), os.getppid()
        self._workers: set[int] = set()
        self._dying: set[int] = set()

    def run(self) -> None:
        """Until the trainer closes its end or is gone; then nothing of what was started is left."""
        with contextlib.suppress(OSError):
            while os.getppid() == self._parent:
                if select.select([self._trainer], [], [], 0.05 if self._dying else TICK)[0]:
                    words = self._trainer.recv(COMMAND.size, socket.MSG_WAITALL)
                    if len(words) < COMMAND.size:
                        break
                    command, pid = COMMAND.unpack(words)
                    if command == FORK:
                        self._fork()
                    elif pid in self._workers:
                        self._kill(pid)
                self._bury()
        for pid in list(self._workers):
            self._kill(pid)
        while self._dying:
            self._bury()
            select.select([], [], [], 0.002)

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as error:
            self._trainer.sendall(ANSWER.pack(-(error.errno or errno.EAGAIN)))
            return
        if not pid:
            try:
                os.close(self._trainer.detach())
                ours.close()
                serve(theirs, self._judges, self._pid)
            finally:
                os._exit(1)
        with contextlib.suppress(OSError):  # both sides do it, since either may be first
            os.setpgid(pid, pid)
        theirs.close()
        self._workers.add(pid)
        socket.send_fds(self._trainer, [ANSWER.pack(pid)], [ours.fileno()])
        ours.close()

    def _kill(self, pid: int) -> None:
        self._workers.discard(pid)
        self._dying.add(pid)
        for kill in (os.killpg, os.kill):  # it may have left its group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)

    def _bury(self) -> None:
        """Waits for what was killed, without waiting; kills what that has left behind."""
        for pid in list(self._dying):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            self._dying.discard(pid)
        for pid in _children() - self._workers - self._dying:
            self._kill(pid)


def serve(trainer: socket.socket, judges: Judges, zygote: int) -> NoReturn:
    """A worker: one frame in, one frame out, until the trainer closes its end or the zygote dies."""
    me = os.getpid()
    os.setpgid(0, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        os._exit(1)
    _limit(judges.memory_limit_mb)
    os.register_at_fork(after_in_child=lambda: os.close(trainer.fileno()))
    reader = trainer.makefile("rb")
    while True:
        number, payload = _frame(reader)
        verdict = _verdict(payload, judges)
        if os.getpid() != me:  # the judge has forked, and this is the child
            os._exit(0)
        verdict["last"] = verdict.get("last", False) or _has_children()
        _send(trainer, number, verdict)


def _verdict(payload: bytes, judges: Judges) -> dict[str, object]:
    """`rewards`, or an `error` in the row; `last` where this process should judge no more."""
    try:
        judge, batch, samples = pickle.loads(payload)
        tasks = []
        for sample, uid in samples:
            solution, ground_truth, extra_info, data_source = pickle.loads(sample)
            tasks.append(Task(judge, solution, ground_truth, extra_info, data_source, uid))
        rewards = judges.verdicts(judge, tasks, batch=batch)
    except UserError as error:
        return {"error": str(error)}
    except BaseException:
        rewards = [CRASHED]
    return {"rewards": [to_json(reward) for reward in rewards], "last": CRASHED in rewards}


def _limit(memory_limit_mb: int) -> None:
    """Memory beyond what the zygote's imports have taken. Data, not address space: the code of libraries, of
    which a GPU build of torch maps gigabytes, does not count."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[5])
    limit = pages * resource.getpagesize() + memory_limit_mb * 2**20
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, it shall not be the trainer


def _has_children() -> bool:
    """Whether the judge has left a process running; those that have ended are waited for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    except ChildProcessError:
        return False


def _children() -> set[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(map(int, file.read().split()))
    except OSError:  # not Linux: only what is in a worker's process group is found
        return set()


def _frame(reader: BinaryIO) -> tuple[int, bytes]:
    head = reader.read(FRAME.size)
    if len(head) < FRAME.size:
        os._exit(0)
    number, length = FRAME.unpack(head)
    return number, reader.read(length)


def _send(trainer: socket.socket, number: int, message: object) -> None:
    body = json.dumps(message).encode()
    trainer.sendall(FRAME.pack(number, len(body)) + body)


def _prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, value, 0, 0, 0)
