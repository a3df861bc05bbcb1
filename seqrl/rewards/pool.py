"""The trainer's side of the processes that run verifiers: starting them, talking to them, ending them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from seqrl.errors import UserError
from seqrl.rewards.worker import ANSWER, COMMAND, FORK, FRAME, KILL

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from seqrl.rewards.worker import main; main(int(sys.argv[2]))"
)
PIECE = 1 << 18
"""Bytes read at once."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Workers are many; each has one thread unless the user's environment says otherwise."""


@dataclass(eq=False)
class Worker:
    pid: int
    socket: socket.socket
    jobs: deque[int] = field(default_factory=deque)
    """Numbers of what it was given, in order; it is busy with the first."""
    since: float = 0.0
    """When it began with that, seconds of the monotonic clock."""
    met: set[str] = field(default_factory=set)
    """Judges it has called."""
    orphan: bool = False
    """Its zygote is gone, and takes it along: what it is at may have done that, or what another is at."""
    slow: bool = False
    """Another has taken its place; it goes on with the one job that it has."""
    stopped: bool = False
    """It is slow, and stands still until nobody waits for a processor."""
    late: bool = False
    """It takes longer than usual; `used` is from when that was seen."""
    spared: float = 0.0
    """Until when it is left alone though its limit has passed, on the same clock."""
    aside: float = 0.0
    """When it was made slow, on the same clock."""
    used: float = 0.0
    """Its processor time, seconds, when it was seen to be late or was made slow."""
    unsent: bytearray = field(default_factory=bytearray)
    unread: bytearray = field(default_factory=bytearray)

    def receive(self, longest: int) -> tuple[list[tuple[int, bytes]], bool]:
        """Whole frames that have come, and whether more may; a frame above `longest` bytes is the end."""
        alive = True
        try:
            piece = self.socket.recv(PIECE)
            alive = bool(piece)
            self.unread += piece
        except BlockingIOError:
            pass
        except OSError:
            alive = False
        frames: list[tuple[int, bytes]] = []
        while len(self.unread) >= FRAME.size:
            number, length = FRAME.unpack_from(self.unread)
            if length > longest:
                return frames, False
            if len(self.unread) < FRAME.size + length:
                break
            frames.append((number, bytes(self.unread[FRAME.size : FRAME.size + length])))
            del self.unread[: FRAME.size + length]
        return frames, alive

    def flush(self) -> None:
        """Sends what the socket takes; a worker that is gone is noticed when it is read."""
        try:
            del self.unsent[: self.socket.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()


class Pool:
    """The zygote and its workers. Raises UserError where the zygote finds fault with a judge."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        """`setup`: the names under `judges`, and the fields of `judges.Judges`."""
        self._setup = setup
        self.workers: list[Worker] = []
        self.coming = 0
        """Workers asked for that are not there yet."""
        self.full = False
        """The last one could not be started; true until one has ended."""
        self._stillborn = 0
        self._start()

    def ask(self) -> None:
        """For one more worker; it appears in `workers` during a `wait`."""
        self.coming += 1
        self._command(FORK, 0)

    def give(self, worker: Worker, frames: bytes) -> None:
        worker.unsent += frames
        worker.flush()
        self._watch(worker)

    def wait(self, timeout: float) -> list[Worker]:
        """At most `timeout` seconds; the workers that have something to read."""
        readable = []
        for key, events in self._selector.select(timeout):
            worker = key.data
            if worker is None:
                self._arrival()
                continue
            if events & selectors.EVENT_WRITE:
                worker.flush()
                self._watch(worker)
            if events & selectors.EVENT_READ:
                readable.append(worker)
        return [worker for worker in readable if worker in self.workers]

    def set_aside(self, worker: Worker) -> None:
        """It goes on with the one job that it has, while another takes its place."""
        worker.slow, worker.aside, worker.used = True, time.monotonic(), _processor_time(worker.pid)

    def stop(self, worker: Worker) -> None:
        """It stands still, with all it has started: even at the lowest priority many would take their share,
        and keep the others from spreading over the processors."""
        worker.stopped = True
        with contextlib.suppress(OSError):
            os.killpg(worker.pid, signal.SIGSTOP)

    def go_on(self, worker: Worker) -> None:
        """It takes up again what it was stopped at, with what the others leave of the processors."""
        worker.stopped = False
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PGRP, worker.pid, 19)
            if hasattr(os, "SCHED_IDLE"):
                os.sched_setscheduler(worker.pid, os.SCHED_IDLE, os.sched_param(0))
            os.killpg(worker.pid, signal.SIGCONT)

    def note(self, worker: Worker) -> None:
        """That it is late."""
        worker.late, worker.used = True, _processor_time(worker.pid)

    def used(self, worker: Worker) -> float:
        """Seconds of processor time since it was late or set aside; 0 where the system does not say."""
        return _processor_time(worker.pid) - worker.used

    def is_running(self, worker: Worker) -> bool:
        """It runs or waits for a processor, for nothing else, or would if it did not stand still; false
        where the system does not say."""
        try:
            with open(f"/proc/{worker.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "RT"
        except (OSError, IndexError):
            return False

    def is_orphan(self, worker: Worker) -> bool:
        """Also before `wait` has noticed: a zygote that ends closes its socket before its workers end."""
        poll = select.poll()
        poll.register(self._control, 0)
        return worker.orphan or any(events & select.POLLHUP for _, events in poll.poll(0))

    def discard(self, worker: Worker) -> None:
        """Ends the worker and what it has started."""
        self._selector.unregister(worker.socket)
        worker.socket.close()
        self.workers.remove(worker)
        self.full = False
        if worker.orphan:  # nobody else would
            with contextlib.suppress(OSError):
                os.killpg(worker.pid, signal.SIGKILL)
        else:
            self._command(KILL, worker.pid)

    def close(self) -> None:
        for worker in self.workers:
            worker.socket.close()
        self.workers = []
        self._selector.close()
        self._finalizer()

    def _start(self) -> None:
        here, there = socket.socketpair()
        control = fcntl.fcntl(there.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)  # 0 to 2 are spoken for
        there.close()
        path = [entry or os.getcwd() for entry in sys.path]
        path += [] if os.getcwd() in path else [os.getcwd()]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, json.dumps(path), str(control)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(control,),
            # One session for all workers, not one each: Linux shares the processor out by session first
            # (autogroups), and a lower priority would count for nothing between them.
            start_new_session=True,
            env={**ONE_THREAD, **os.environ},
        )
        os.close(control)
        self._control = here
        self._finalizer = weakref.finalize(self, _end, here, process, os.getpid())
        self._selector = selectors.DefaultSelector()
        self._selector.register(here, selectors.EVENT_READ, None)
        self.versions: dict[str, str] = self._hello(process)["versions"]

    def _hello(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        try:
            with contextlib.suppress(BrokenPipeError):
                setup = pickle.dumps(self._setup)
                self._control.sendall(FRAME.pack(0, len(setup)) + setup)
            with self._control.makefile("rb") as reader:
                head = reader.read(FRAME.size)
                hello = json.loads(reader.read(FRAME.unpack(head)[1])) if len(head) == FRAME.size else {}
        except BaseException:
            self.close()
            raise
        if "versions" in hello:
            return hello
        self.close()
        if "error" in hello:
            raise UserError(hello["error"])
        own = [judge for judge in self._setup["judges"] if ":" in judge]
        if own and "bug" not in hello:
            raise UserError(
                f"custom_reward_function: importing {' or '.join(own)} ended the process (code "
                f"{process.returncode}); a file of reward functions must not"
            )
        raise RuntimeError(hello.get("bug", f"the process that runs verifiers ended: {process.returncode}"))

    def _arrival(self) -> None:
        """A new worker; or the end of the zygote, and of its workers with it: then another is started."""
        try:
            answer, sockets, _, _ = socket.recv_fds(self._control, ANSWER.size, 1)
        except OSError:
            answer, sockets = b"", []
        if len(answer) < ANSWER.size:
            self._stillborn += 1
            if self._stillborn > 3:
                raise RuntimeError(
                    "the process that runs verifiers ends as soon as it starts; is memory short?"
                )
            self._renew()
            return
        self.coming -= 1
        (pid,) = ANSWER.unpack(answer)
        if pid < 0:
            self.full = True
            if not any(worker.jobs for worker in self.workers):
                raise RuntimeError(f"cannot start a process for verifiers: {os.strerror(-pid)}")
            return
        self._stillborn = 0
        worker = Worker(pid, socket.socket(fileno=sockets[0]))
        worker.socket.setblocking(False)
        worker.socket.set_inheritable(False)
        self.workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _renew(self) -> None:
        self._finalizer()
        self._selector.close()
        self._start()
        for worker in self.workers:  # each is still to be read to its end
            worker.orphan = True
            self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        for _ in range(self.coming):
            self._command(FORK, 0)

    def _watch(self, worker: Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
        if self._selector.get_key(worker.socket).events != events:
            self._selector.modify(worker.socket, events, worker)

    def _command(self, command: bytes, pid: int) -> None:
        with contextlib.suppress(OSError):  # that the zygote is gone shows in `wait`
            self._control.sendall(COMMAND.pack(command, pid))


def _processor_time(pid: int) -> float:
    """Seconds."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _end(control: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    """The zygote ends its workers and itself when the socket is shut, in milliseconds."""
    if os.getpid() != owner:  # a fork of the trainer ends, not the trainer
        return
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
