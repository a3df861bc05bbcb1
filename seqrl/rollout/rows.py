"""What has been drawn for the rows that are decoded together, and who of them has ended.

All of it stays in one place on the model's device, as CUDA graphs want it: a row's numbers are filled in, and
no tensor takes the place of another.

Shape legend: B rows, S most new tokens, V vocabulary; a place is where the tokens of a request are gathered,
from its first to its last, while rows move up when others leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqrl.kernels import Arriving, sent
from seqrl.rollout.sampling import request_uniforms, sample
from seqrl.types import SamplingParams


class Request(NamedTuple):
    prompt: int
    """Index into the prompts of the call."""
    response: int


class Response(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    finished: bool


@dataclass(frozen=True)
class Left:
    """Requests that have left, with what was drawn for them, on its way to the host: [requests, tokens]."""

    requests: Sequence[Request]
    drawn: Sequence[int]
    """Tokens of each, those after its end included."""
    tokens: Arriving
    logprobs: Arriving

    def responses(self, eos: Tensor) -> Iterator[tuple[Request, Response]]:
        """Each up to its first token of `eos`."""
        tokens, logprobs = self.tokens.get(), self.logprobs.get()
        is_end = torch.isin(tokens, eos)
        for k, (request, count) in enumerate(zip(self.requests, self.drawn, strict=True)):
            ends = is_end[k, :count].nonzero()
            length = int(ends[0]) + 1 if len(ends) else count
            yield request, Response(tokens[k, :length], logprobs[k, :length], len(ends) > 0)


class DecodedRows:
    """At most `capacity` rows, in tensors that have room for `room` of them; those behind the last belong to
    nobody, and may be drawn for all the same."""

    def __init__(
        self,
        device: torch.device,
        eos_ids: Sequence[int],
        sampling: SamplingParams,
        capacity: int,
        *,
        room: int | None = None,
        lag: int = 0,
    ) -> None:
        """`lag`: how many looks later who has ended is asked for, so that the device has work meanwhile."""
        self.device, self.sampling, self.steps = device, sampling, sampling.max_new_tokens
        self.capacity, self.lag = capacity, lag
        self.eos_on_host = torch.tensor([] if sampling.ignore_eos else eos_ids, dtype=torch.long)
        self.eos = sent(self.eos_on_host, device)
        room = capacity if room is None else room
        # By place, and one place for nobody's rows; the last column takes what is drawn after the limit.
        sizes = (capacity + 1, self.steps + 1)
        self.uniforms = torch.zeros(sizes, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(sizes, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(sizes, device=device)
        # By row.
        self.place, self.count, self.last, self.limit = torch.zeros(4, room, dtype=torch.long, device=device)
        self.ends = torch.zeros(room, dtype=torch.bool, device=device)
        self.begin()

    def begin(self) -> None:
        """Without rows."""
        self.requests: list[Request] = []
        self._steps_taken = 0
        self._joined: list[int] = []
        """Steps that were taken before each row joined, ascending."""
        self._places: list[int] = []
        self._free = list(range(self.capacity))
        self._looks: deque[tuple[list[tuple[Request, int]], Arriving]] = deque()
        self._belong_to_nobody(0)

    def _belong_to_nobody(self, first: int) -> None:
        """The rows from `first` on: they stay at their first token."""
        self.place[first:] = self.capacity
        self.count[first:] = 0
        self.limit[first:] = 0

    @property
    def drawn(self) -> list[int]:
        """Tokens that each row has, or the limit: one from the prompt, and one of each step since."""
        return [min(1 + self._steps_taken - joined, self.steps) for joined in self._joined]

    @property
    def most_drawn(self) -> int:
        return min(1 + self._steps_taken - self._joined[0], self.steps)

    @property
    def least_drawn(self) -> int:
        return min(1 + self._steps_taken - self._joined[-1], self.steps)

    def join(self, requests: Sequence[Request], uids: Sequence[str], seed: int, logits: Tensor) -> None:
        """Appends a row for each, and draws its first token from `logits` [requests, V]."""
        places, self._free = self._free[: len(requests)], self._free[len(requests) :]
        uniforms = [
            request_uniforms(seed, uid, request.response, self.steps)
            for request, uid in zip(requests, uids, strict=True)
        ]
        rows = slice(len(self.requests), len(self.requests) + len(requests))
        place = sent(torch.tensor(places), self.device)
        self.uniforms[place, : self.steps] = sent(torch.stack(uniforms), self.device)
        self.place[rows] = place
        self.count[rows], self.limit[rows], self.ends[rows] = 0, self.steps, False
        self.requests += requests
        self._joined += [self._steps_taken] * len(requests)
        self._places += places
        self.draw(rows, logits)

    def draw(self, rows: slice, logits: Tensor) -> None:
        """One more token for each of `rows`, from `logits` [B, V]; of whoever is at the limit it is lost."""
        place, count, ends = self.place[rows], self.count[rows], self.ends[rows]
        drawn, logprobs = sample(logits, self.uniforms[place, count], self.sampling)
        self.tokens[place, count], self.logprobs[place, count] = drawn, logprobs
        self.last[rows] = drawn
        count += count < self.limit[rows]
        if self.eos.numel():
            ends |= (drawn[:, None] == self.eos).any(1)

    def took(self, steps: int) -> None:
        """So many steps, each of which drew a token for all rows."""
        self._steps_taken += steps

    def going(self) -> list[int] | None:
        """The rows to go on with, ascending; None where none is known to have ended."""
        over = self._over() if self.eos.numel() else set()
        if not over and self.most_drawn < self.steps:
            return None
        state = zip(self._who(), self.drawn, strict=True)
        kept = [i for i, (who, count) in enumerate(state) if who not in over and count < self.steps]
        return None if len(kept) == len(self.requests) else kept

    def _who(self) -> list[tuple[Request, int]]:
        """What tells rows apart: a request may be put back, and join again."""
        return list(zip(self.requests, self._joined, strict=True))

    def _over(self) -> set[tuple[Request, int]]:
        """Those that had drawn the end of a response, as many looks ago as there is lag."""
        ends = self.ends[: len(self.requests)]
        if not self.lag:
            who = self._who() if ends.any() else []
        else:
            self._looks.append((self._who(), Arriving(ends.clone())))
            if len(self._looks) <= self.lag:
                return set()
            who, arriving = self._looks.popleft()
            ends = arriving.get()
        return {row for row, ended in zip(who, ends.tolist(), strict=False) if ended}

    def leave(self, kept: Sequence[int]) -> Left:
        """All rows but those `kept`, which move up."""
        staying = set(kept)
        gone = [i for i in range(len(self.requests)) if i not in staying]
        counts = self.drawn
        drawn = [counts[i] for i in gone]
        place, most = sent(torch.tensor([self._places[i] for i in gone]), self.device), max(drawn, default=0)
        left = Left(
            [self.requests[i] for i in gone],
            drawn,
            Arriving(self.tokens[:, :most].index_select(0, place)),
            Arriving(self.logprobs[:, :most].index_select(0, place)),
        )
        self.keep(kept)
        return left

    def keep(self, kept: Sequence[int]) -> None:
        """Drops all rows but those `kept`, ascending, which move up."""
        staying = {self._places[i] for i in kept}
        self._free += [place for place in self._places if place not in staying]
        rows = sent(torch.tensor(kept, dtype=torch.long), self.device)
        for x in (self.place, self.count, self.last, self.ends):
            x[: len(kept)] = x[rows]
        self._belong_to_nobody(len(kept))
        self.requests = [self.requests[i] for i in kept]
        self._joined = [self._joined[i] for i in kept]
        self._places = [self._places[i] for i in kept]
