"""How `benchmarks.update` counts."""

from __future__ import annotations

import time

from benchmarks.update import Update, quickest_passes


def test_the_quickest_update_counts_without_its_optimizer_step() -> None:
    waits = iter([0.06, 0.03])

    def side() -> Update:
        time.sleep(next(waits, 0.2))
        return Update(1.0, 0.025)

    assert 0.005 <= quickest_passes(side, 0.1) < 0.025, "0.03 less 0.025, neither 0.03 nor 0.035"
