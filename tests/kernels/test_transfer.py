"""What goes between host and device. That nobody waits is held in tests/training/test_no_waits.py."""

from __future__ import annotations

import torch

from seqrl.kernels import Arriving, sent


def test_on_the_host_nothing_is_copied() -> None:
    x = torch.arange(3)
    assert sent(x, torch.device("cpu")) is x
    assert Arriving(x).get() is x


def test_what_is_sent_is_there() -> None:
    x = sent(torch.arange(6.0).view(2, 3), torch.device("meta"))
    assert x.device.type == "meta" and x.shape == (2, 3) and x.dtype == torch.float32
