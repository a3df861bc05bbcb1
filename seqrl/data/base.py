"""What the loop asks of whatever chooses the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Sampler(Protocol):
    steps_per_epoch: int
    epoch: int

    def next_batch(self) -> list[int]:
        """Indices of the next rollout batch's prompts."""

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: Mapping[str, int]) -> None: ...
