"""How `benchmarks.update` counts."""

from __future__ import annotations

import time

from benchmarks.update import Update, quickest_passes


def test_the_quickest_update_counts_without_its_optimizer_step() -> None:
    waits = iter([0.03, 0.01])

    def side() -> Update:
        time.sleep(next(waits, 0.05))
        return Update(1.0, 0.004)

    assert 0.006 <= quickest_passes(side, 0.05) < 0.026
