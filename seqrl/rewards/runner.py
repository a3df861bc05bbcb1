"""Runs verifiers where they can hang, crash and exhaust memory without harm: in processes of their own.

Each task gets exactly one reward. A worker that takes longer than its kind of task usually does is set aside
while a fresh one takes its place, so that many hanging samples wait side by side for their limit
(docs/decisions/reward-runner.md says what that costs). All of this happens in the calling thread, within
`run`: no signal handlers, no threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from seqrl.errors import UserError
from seqrl.reward import Reward
from seqrl.rewards.judges import CRASHED, Task, from_json
from seqrl.rewards.pool import Pool, Worker
from seqrl.rewards.worker import FRAME, LONGEST_VERDICT

if TYPE_CHECKING:
    from seqrl.config.schema import CodeRewardConfig

__all__ = ["Runner", "Task"]

TIMED_OUT = Reward(0.0, "timed out", failed=True)

TICK = 0.002
"""Seconds between looks at the clock."""
PATIENCE = 0.005
"""Seconds that any task may take before another worker takes the place of its own; then it has half as much
of processor time, lest it was only waiting for a processor."""
USUALLY = 2.0
"""So many times what tasks of its kind typically take, where that is longer."""
FAIR = 3.0
"""So many times the patience for its kind is a slow worker's share of a processor: having had it, it stands
still until nobody waits, and times out at its limit."""
HOPE = 0.5
"""The share of slow workers that end by themselves, below which they stand still at once."""
RETRIED = 32
"""Then, too, one in so many goes on until it has had its share."""
MANY = 0.25
"""The share of recent tasks set aside, at which no more are."""
SLOW_WORKERS = 256
"""Most workers that are set aside; beyond them a hanging one keeps its place."""
CHUNK = 32
"""Most tasks that a worker is given at once."""
CACHE_COUNT, CACHE_BYTES = 1 << 18, 1 << 26


class Runner:
    """Judges responses in worker processes. A context manager; `close` ends the processes.

    `workers`: processes side by side; null: one for each core, at most 8. `time_limit`: seconds of wall clock
    for one response, `memory_limit_mb`: MB for one. `arguments`: more arguments, by name, for functions of
    the user's own. Raises UserError where a judge is not known or cannot be loaded.
    """

    def __init__(
        self,
        judges: Sequence[str],
        *,
        workers: int | None,
        time_limit: float,
        memory_limit_mb: int,
        code: CodeRewardConfig,
        arguments: Mapping[str, Any],
    ) -> None:
        self._workers = workers or min(8, _cores())
        self._time_limit = time_limit
        self._paces: dict[tuple[str, bool], Pace] = {}
        self._number = 0
        self._cache = Cache(CACHE_COUNT, CACHE_BYTES)
        self._pool = Pool(
            {
                "judges": list(judges),
                "arguments": dict(arguments),
                "code": pickle.dumps(code),
                "time_limit": time_limit,
                "memory_limit_mb": memory_limit_mb,
            }
        )

    @property
    def cache_hits(self) -> int:
        """Rewards that came from the cache so far."""
        return self._cache.hits

    def run(self, tasks: Sequence[Task]) -> list[Reward]:
        """One reward for each task, in their order. Raises UserError for the first row nobody can judge."""
        samples = [_sample(task) for task in tasks]
        keys = [self._key(task.judge, sample) for task, sample in zip(tasks, samples, strict=True)]
        rewards = [self._cache.get(key) for key in keys]
        missing = [i for i, reward in enumerate(rewards) if reward is None]
        outcomes = self._judge(
            [_Job(tasks[i].judge, [(samples[i], tasks[i].uid)], self._time_limit) for i in missing]
        )
        for i, outcome in zip(missing, outcomes, strict=True):
            if isinstance(outcome, str):
                raise UserError(f"sample {tasks[i].uid}: {outcome}")
            (rewards[i],) = outcome
            if not outcome[0].failed:
                self._cache.put(keys[i], outcome[0])
        return [reward for reward in rewards if reward is not None]

    def run_batch(self, judge: str, tasks: Sequence[Task]) -> list[Reward]:
        """All tasks in one call of a user's function that takes lists; a failure fails all of them.

        They have `time_limit` each, together.
        """
        if not tasks:
            return []
        samples = [(_sample(task), task.uid) for task in tasks]
        (outcome,) = self._judge([_Job(judge, samples, self._time_limit * len(tasks), batch=True)])
        if isinstance(outcome, str):
            raise UserError(outcome)
        return outcome

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key(self, judge: str, sample: bytes) -> bytes:
        version = self._pool.versions.get(judge, "")
        return hashlib.blake2b(f"{judge}\0{version}\0".encode() + sample, digest_size=16).digest()

    def _judge(self, jobs: Sequence[_Job]) -> list[list[Reward] | str]:
        numbered = dict(enumerate(jobs, start=self._number))
        self._number += len(jobs)  # never used again: a late answer cannot pass for one to another task
        run = _Run(self._pool, self._workers, self._paces, numbered)
        run.finish()
        return [run.outcomes[number] for number in numbered]


@dataclass
class Pace:
    """How long the tasks of a judge take, those that end by themselves."""

    mean: float = 0.0
    """Seconds; the recent ones count more."""
    square: float = 0.0
    """The mean of their squares."""
    count: int = 0
    impatience: float = 0.0
    """The share of recent tasks whose worker was set aside."""
    aside: int = 0
    """Tasks whose worker was set aside."""
    hope: float = 1.0
    """The share of the recent ones among these that ended by themselves, before they had their share."""

    def add(self, seconds: float, *, aside: bool) -> None:
        self.count = min(self.count + 1, 256)
        self.mean += (seconds - self.mean) / self.count
        self.square += (seconds**2 - self.square) / self.count

        if aside:  # and counted in `impatience` then
            self.hope += (1 - self.hope) / 8
        else:
            self.impatience -= self.impatience / 64

    def add_aside(self) -> None:
        self.impatience += (1 - self.impatience) / 64
        self.aside += 1

    def add_hanging(self) -> None:
        self.hope -= self.hope / 8

    @property
    def typical(self) -> float:
        """Seconds that the task takes in which an average second is spent: of many quick ones and a few slow
        ones, about that of the slow ones."""
        return self.square / self.mean if self.mean else 0.0


@dataclass
class Cache:
    """Rewards by the hash of all they depend on; the ones not used for longest are dropped first."""

    most: int
    most_bytes: int
    hits: int = 0
    _kept: OrderedDict[bytes, Reward] = field(default_factory=OrderedDict)
    _size: int = 0

    def get(self, key: bytes) -> Reward | None:
        reward = self._kept.get(key)
        if reward is not None:
            self._kept.move_to_end(key)
            self.hits += 1
        return reward

    def put(self, key: bytes, reward: Reward) -> None:
        if key in self._kept:
            return
        self._kept[key] = reward
        self._size += _bytes(reward)
        while len(self._kept) > self.most or self._size > self.most_bytes:
            self._size -= _bytes(self._kept.popitem(last=False)[1])


@dataclass
class _Job:
    """What one call of a judge is given: one sample, or all of them under `batch`."""

    judge: str
    samples: list[tuple[bytes, str]]
    """Each pickled, with its uid."""
    limit: float
    """Seconds."""
    batch: bool = False

    def frame(self, number: int) -> bytes:
        payload = pickle.dumps((self.judge, self.batch, self.samples), protocol=5)
        return FRAME.pack(number, len(payload)) + payload


class _Run:
    """One call of `Runner.run`: jobs by number in, `outcomes` by number out (rewards, or what is wrong with
    the row)."""

    def __init__(
        self, pool: Pool, size: int, paces: dict[tuple[str, bool], Pace], jobs: Mapping[int, _Job]
    ) -> None:
        self._pool, self._size, self._paces, self._jobs = pool, size, paces, jobs
        numbers = list(jobs)
        random.Random(0).shuffle(numbers)  # the responses of one prompt tend to hang together
        self._queue = deque(numbers)
        self._suspects: deque[int] = deque()
        """Their worker died under them, but it was not fresh: they are judged once more, by one that is."""
        self._accused: deque[int] = deque()
        """Their worker died with the zygote, which one of them may have killed: each is judged once more with
        nobody else at work, until the one that does it again is found."""
        self._longest = LONGEST_VERDICT * max([len(job.samples) for job in jobs.values()], default=1)
        self._looked = self._woken = 0.0
        self._alone: float | None = None
        """Since when only slow workers are at work, and have all the processors."""
        self.outcomes: dict[int, list[Reward] | str] = {}

    def finish(self) -> None:
        try:
            while len(self.outcomes) < len(self._jobs):
                self._hand_out()
                for worker in self._pool.wait(TICK):
                    self._read(worker)
                self._look_at_clock()
        except BaseException:  # Ctrl-C, say: nobody waits for what they are doing
            for worker in [worker for worker in self._pool.workers if worker.jobs]:
                self._pool.discard(worker)
            raise

    def _hand_out(self) -> None:
        while self._accused and self._accused[0] in self.outcomes:
            self._accused.popleft()
        if self._accused:
            self._try_alone()
            return
        workers = [worker for worker in self._pool.workers if not worker.slow and not worker.orphan]
        idle = [worker for worker in workers if not worker.jobs]
        free = self._size - len(workers) + len(idle)
        for worker in idle[: max(0, free)]:
            if self._suspects and not worker.met:
                self._give(worker, [self._suspects.popleft()])
            elif self._queue:
                size = max(1, min(CHUNK, len(self._queue) // (2 * self._size)))
                self._give(worker, [self._queue.popleft() for _ in range(size)])
        busy = sum(bool(worker.jobs) for worker in workers)
        wanted = min(self._size, busy + len(self._queue))
        if self._queue and len(workers) < len(self._pool.workers):
            wanted += 1  # a spare, for the next that hangs
        for _ in range(max(len(self._suspects), wanted - len(workers)) - self._pool.coming):
            if not self._pool.full:
                self._pool.ask()

    def _try_alone(self) -> None:
        if any(worker.jobs for worker in self._pool.workers):
            return
        fresh = [worker for worker in self._pool.workers if not worker.met and not worker.orphan]
        if fresh:
            self._give(fresh[0], [self._accused[0]])
        elif not self._pool.coming:
            self._pool.ask()

    def _give(self, worker: Worker, numbers: list[int]) -> None:
        worker.jobs.extend(numbers)
        worker.since = time.monotonic()
        self._pool.give(worker, b"".join(self._jobs[number].frame(number) for number in numbers))

    def _read(self, worker: Worker) -> None:
        verdicts, alive = worker.receive(self._longest)
        for number, body in verdicts:
            if not worker.jobs or number != worker.jobs[0]:
                alive = False
                break
            job = self._jobs[number]
            try:
                outcome, last = _read_verdict(body, len(job.samples))
            except ValueError:
                outcome, last = [CRASHED] * len(job.samples), True
            now = time.monotonic()
            seconds = now - worker.since
            if worker.slow:  # not the time it waited for others
                seconds = worker.aside - worker.since + self._pool.used(worker)
            pace = self._paces.setdefault((job.judge, job.judge in worker.met), Pace())
            pace.add(seconds, aside=worker.slow)
            worker.met.add(job.judge)
            worker.jobs.popleft()
            worker.since, worker.late = now, False
            self.outcomes[number] = outcome
            if last or worker.slow:
                self._discard(worker)
                return
        if not alive:
            self._lost(worker)

    def _lost(self, worker: Worker) -> None:
        """It ended, or answered what nobody asked; whether it was this task's fault, a fresh worker tells."""
        if worker.jobs:
            number = worker.jobs.popleft()
            if self._pool.is_orphan(worker) and number not in self._accused:
                (self._accused.append if worker.slow else self._accused.appendleft)(number)
            elif worker.met:
                self._suspects.append(number)
            else:
                self.outcomes[number] = [CRASHED] * len(self._jobs[number].samples)
                if self._pool.is_orphan(worker):  # found: the others are not accused any more
                    self._queue.extendleft(other for other in self._accused if other != number)
                    self._accused.clear()
        self._discard(worker)

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if now < self._looked + TICK:
            return
        self._looked = now
        busy = [worker for worker in self._pool.workers if worker.jobs]
        slow = sum(worker.slow for worker in busy)
        if self._queue or self._suspects or slow < len(busy):
            self._alone = None
        else:
            self._alone = self._alone or now
        waiting = self._waiting()
        if not waiting:
            self._go_on([worker for worker in busy if worker.slow], now)
        for worker in busy:
            job = self._jobs[worker.jobs[0]]
            if worker.stopped and waiting:
                continue
            if now >= max(worker.since + job.limit, worker.spared):
                if worker.slow and self._starved(worker, now):
                    worker.spared = now + 10 * TICK
                    continue
                self.outcomes[worker.jobs.popleft()] = [TIMED_OUT] * len(job.samples)
                self._discard(worker)
            elif not worker.slow and slow < SLOW_WORKERS and self._hangs(worker, now):
                slow += 1
                self._take_back(worker, keep=1)
                self._set_aside(worker)
            elif worker.slow and waiting and self._had_its_share(worker):
                self._pace_of(worker).add_hanging()
                self._pool.stop(worker)

    def _set_aside(self, worker: Worker) -> None:
        """Where most such tasks are known to hang, it stands still at once, until nobody waits any more."""
        pace = self._pace_of(worker)
        pace.add_aside()
        self._pool.set_aside(worker)
        if pace.hope < HOPE and pace.aside % RETRIED and self._pool.is_running(worker):
            self._pool.stop(worker)

    def _go_on(self, slow: Sequence[Worker], now: float) -> None:
        """Nobody waits any more: those that stand still have all the processors, until their limit. First
        those that have not had their share."""
        for worker in slow:
            if worker.stopped and not worker.spared:
                worker.spared = now + self._jobs[worker.jobs[0]].limit
        stopped = [worker for worker in slow if worker.stopped]
        if not stopped or now < self._woken + 10 * TICK:
            return
        self._woken = now
        first = [
            worker for worker in slow if not self._had_its_share(worker) and self._pool.is_running(worker)
        ]
        for worker in stopped:
            if worker in first or not first:
                self._pool.go_on(worker)

    def _waiting(self) -> bool:
        """Whether tasks wait for a worker, which they could have now."""
        if self._accused:
            return False
        normal = (worker for worker in self._pool.workers if not worker.slow)
        return bool(self._queue or self._suspects) or any(len(worker.jobs) > 1 for worker in normal)

    def _hangs(self, worker: Worker, now: float) -> bool:
        """Whether another worker should take its place: not where nobody waits for that, nor where nothing is
        known of the judge yet (a first call, which may load something, has a pace of its own)."""
        waiting = not self._accused and (self._queue or self._suspects or len(worker.jobs) > 1)
        judge = self._jobs[worker.jobs[0]].judge
        if not waiting or self._pool.full or now < worker.since + self._usual(judge, judge in worker.met):
            return False
        if not worker.late:
            self._pool.note(worker)
            return False
        return self._pool.used(worker) > PATIENCE / 2 or not self._pool.is_running(worker)

    def _usual(self, judge: str, met: bool) -> float:
        """Seconds; infinite too where many are set aside: then all are slower than they were."""
        pace = self._pace(judge, met)
        if not pace.count or pace.impatience > MANY:
            return math.inf
        return max(PATIENCE, USUALLY * pace.typical)

    def _pace_of(self, worker: Worker) -> Pace:
        judge = self._jobs[worker.jobs[0]].judge
        return self._pace(judge, judge in worker.met)

    def _pace(self, judge: str, met: bool) -> Pace:
        return self._paces.get((judge, met)) or self._paces.setdefault((judge, False), Pace())

    def _starved(self, worker: Worker, now: float) -> bool:
        """It has had too little of the processors to tell whether it hangs or is a little slow."""
        late = self._alone is not None and now >= self._alone + self._jobs[worker.jobs[0]].limit
        return not late and not self._had_its_share(worker) and self._pool.is_running(worker)

    def _had_its_share(self, worker: Worker) -> bool:
        """Of a processor: enough for what is a little slow."""
        judge = self._jobs[worker.jobs[0]].judge
        return self._pool.used(worker) >= FAIR * self._usual(judge, judge in worker.met)

    def _take_back(self, worker: Worker, keep: int = 0) -> None:
        """The tasks it has not begun with are others' now."""
        while len(worker.jobs) > keep:
            self._queue.appendleft(worker.jobs.pop())

    def _discard(self, worker: Worker) -> None:
        self._take_back(worker)
        self._pool.discard(worker)


def _read_verdict(body: bytes, count: int) -> tuple[list[Reward] | str, bool]:
    """The outcome, and whether its worker should do no more; raises ValueError where it makes no sense."""
    try:
        verdict = json.loads(body)
        error, last = verdict.get("error"), bool(verdict["last"])
        if isinstance(error, str):
            return error, last
        rewards = [from_json(reward) for reward in verdict["rewards"]]
    except (KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(body[:80]) from problem
    if len(rewards) != count:
        raise ValueError(f"{len(rewards)} rewards for {count}")
    return rewards, last


def _sample(task: Task) -> bytes:
    """What a verdict depends on, but for the judge. Raises UserError where it cannot be sent."""
    try:
        return pickle.dumps(
            (task.solution, task.ground_truth, dict(task.extra_info), task.data_source), protocol=5
        )
    except Exception as error:
        raise UserError(
            f"sample {task.uid}: its extra_info or ground truth cannot be sent to another process ({error}); "
            "leave values and lists of them"
        ) from error


def _bytes(reward: Reward) -> int:
    """About what it takes in memory, with its key."""
    return 600 + 4 * len(reward.why) + 4 * len(reward.answer or "") + 150 * len(reward.parts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
