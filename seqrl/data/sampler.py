"""Which prompts the next batch holds. The state is an epoch and a position in it, nothing more."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from seqrl.errors import UserError


class PromptSampler:
    """Draws batches of prompt indices, epoch after epoch, each epoch in an order of its own.

    The order follows from `seed` and the epoch alone. The last, incomplete batch of an epoch is
    dropped, as verl does. Raises UserError where the prompts do not fill one batch.
    """

    def __init__(self, n_prompts: int, batch_size: int, *, shuffle: bool, seed: int) -> None:
        if n_prompts == 0:
            raise UserError("data.train_files gives no prompts; name at least one file or task")
        if batch_size < 1:
            raise UserError(f"data.train_batch_size={batch_size} must be at least 1")
        if n_prompts < batch_size:
            raise UserError(
                f"data.train_batch_size={batch_size} is more than the {n_prompts} prompts of "
                "data.train_files; lower it or add prompts"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = n_prompts // batch_size
        self._identity = {"n_prompts": n_prompts, "seed": seed, "shuffle": int(shuffle)}
        self._start_epoch(0)

    def next_batch(self) -> list[int]:
        """The next `batch_size` indices into the prompts."""
        if self._position + self.batch_size > len(self._order):
            self._start_epoch(self.epoch + 1)
        start = self._position
        self._position += self.batch_size
        return list(self._order[start : self._position])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self._position, **self._identity}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where `state` was taken; raises UserError where it is of other prompts or another seed."""
        for name, value in self._identity.items():
            if state[name] != value:
                raise UserError(
                    f"the checkpoint's sampler has {name}={state[name]}, this run {name}={value}; resume "
                    "with the data.train_files, data.shuffle and data.seed it had, or start anew in another "
                    "trainer.default_local_dir"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._position = 0
        self._order = self._permutation()

    def _permutation(self) -> Sequence[int]:
        indices = range(self._identity["n_prompts"])
        if not self._identity["shuffle"]:
            return indices
        # A string seeds through SHA-512: neighbouring seeds and epochs give unrelated orders.
        return random.Random(f"{self._identity['seed']}/{self.epoch}").sample(indices, len(indices))
