"""Log-probs and entropies from hidden states, and back: seqrl's head, all logits at once, and its peers.

    python -m benchmarks.logprob_head [--tokens 4096] [--turns 5] [--dtype float32 bfloat16] [--out DIRECTORY]

Hidden size 1024 and a vocabulary of 151,936, as Qwen3-0.6B has them. Every side gives the log-prob and the
entropy of each token and the gradients of hidden states and weight, all of the same numbers, temperature 1;
entropies carry no gradient, as in training without an entropy term. First results are compared, then
time is taken in turns and the peak of memory, both in processes of each side's own.

- all logits: one product, `log_softmax`, autograd.
- verl: `FusedLinearForPPO`, its torch version (the other one wants Triton).
- TRL: `ChunkedLogProbFunction` as its `GRPOTrainer` calls it.
- Liger: `LigerFusedLinearGRPOLoss`, sequence by sequence as by default. It gives a loss and no entropies, so
  it has less to do; its `LigerFusedLinearCrossEntropyLoss` wants Triton.
Peers that do not import are left out and named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.measure import (
    RESULTS,
    Elsewhere,
    Ratio,
    in_fresh_process,
    peak_memory,
    setting,
    table,
    take_turns,
    write_results,
)
from seqrl.training.head import Logits, token_statistics

HIDDEN, VOCABULARY, SEQUENCE = 1024, 151_936, 512
"""SEQUENCE: tokens of one for Liger, which wants a batch of sequences."""
TRL_CHUNK = 32_768
"""Entries of the vocabulary in a tile of TRL's, by its trainer/utils.py."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("verl", "trl", "liger-kernel")


@dataclass(frozen=True)
class Numbers:
    """R tokens."""

    hidden: Tensor
    """[R, H]"""
    weight: Tensor
    """[V, H]"""
    tokens: Tensor
    """[R]"""
    grad: Tensor
    """[R], of log-probs; one number for each sequence, as advantages are."""

    @classmethod
    def random(cls, tokens: int, dtype: torch.dtype) -> Numbers:
        """Logits with a standard deviation of about 3."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, HIDDEN, generator=generator)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.1)
        grad = torch.randn(-(-tokens // SEQUENCE), generator=generator).repeat_interleave(SEQUENCE)
        return cls(
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(),
            torch.randint(0, VOCABULARY, (tokens,), generator=generator),
            grad[:tokens] / tokens,
        )


Head = Callable[[Numbers], tuple[Tensor, Tensor]]
"""Gives log-probs and entropies [R] of numbers, with a graph behind the former."""


def of_seqrl() -> Head:
    def head(x: Numbers) -> tuple[Tensor, Tensor]:
        said = token_statistics(Logits(x.hidden, x.weight), x.tokens, temperature=1.0, entropy=True)
        assert said.entropy is not None
        return said.logprobs, said.entropy

    return head


def of_all_logits() -> Head:
    def head(x: Numbers) -> tuple[Tensor, Tensor]:
        logprobs = linear(x.hidden, x.weight).float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, x.tokens[:, None])[:, 0], entropy

    return head


def of_verl() -> Head:
    with _Without("liger_kernel"):  # verl takes one that is there but imports no Triton for a mistake
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return lambda x: fused(x.hidden, x.weight, x.tokens)


def of_trl() -> Head:
    from trl.kernels import ChunkedLogProbFunction

    asked = (1.0, TRL_CHUNK, None, 1.0, ("log_probs", "entropy"))
    return lambda x: ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.tokens, *asked)[:2]


def run_with(head: Head) -> Callable[[Numbers], dict[str, Tensor]]:
    def run(x: Numbers) -> dict[str, Tensor]:
        logprobs, entropy = head(x)
        gradients = torch.autograd.grad(logprobs, (x.hidden, x.weight), x.grad.to(logprobs.dtype))
        return {"logprobs": logprobs.detach(), "entropy": entropy.detach()} | _named(gradients)

    return run


def run_liger() -> Callable[[Numbers], dict[str, Tensor]]:
    """Its loss has the gradient of the sum of log-probs times grad: ratios are 1 and advantages -grad R."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def run(x: Numbers) -> dict[str, Tensor]:
        shape = (-1, min(SEQUENCE, len(x.tokens)))
        tokens, mask = x.tokens.view(shape), torch.ones_like(x.tokens.view(shape))
        advantages = -x.grad.view(shape)[:, 0] * len(x.tokens)
        loss, _ = fused(x.hidden.view(*shape, HIDDEN), x.weight, tokens, mask, advantages)
        return _named(torch.autograd.grad(loss, (x.hidden, x.weight)))

    return run


def _named(gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("gradient of hidden states", "gradient of weight"), gradients, strict=True))


class _Without:
    """For this time a package cannot be found."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)


SIDES: dict[str, Callable[[], Callable[[Numbers], dict[str, Tensor]]]] = {
    "seqrl": lambda: run_with(of_seqrl()),
    "all logits": lambda: run_with(of_all_logits()),
    "verl": lambda: run_with(of_verl()),  # before Liger is imported
    "TRL": lambda: run_with(of_trl()),
    "Liger": run_liger,
}


def importable() -> dict[str, Callable[[Numbers], dict[str, Tensor]]]:
    found = {}
    for name, make in SIDES.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"*** {name} does not import here: {error} ***", file=sys.stderr)
    return found


def warm(name: str, dtype: torch.dtype) -> Callable[[Numbers], dict[str, Tensor]]:
    """A side whose libraries are loaded and whose kernels are compiled."""
    run = SIDES[name]()
    run(Numbers.random(16, dtype))
    return run


def memory(name: str, tokens: int, dtype: torch.dtype) -> int:
    """Bytes at the peak above inputs; for a process of its own."""
    run, numbers = warm(name, dtype), Numbers.random(tokens, dtype)
    return peak_memory(lambda: run(numbers))[1]


def disagreement(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result, by the norm."""
    return {
        key: float((theirs[key].float() - ours[key].float()).norm() / ours[key].float().norm())
        for key in theirs
    }


def disagreements(tokens: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """How far each side that imports here is from seqrl, whose own are none."""
    sides, numbers = importable(), Numbers.random(tokens, dtype)
    ours = sides["seqrl"](numbers)
    return {name: disagreement(ours, run(numbers)) if name != "seqrl" else {} for name, run in sides.items()}


def timed_side(name: str, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    run, numbers = warm(name, dtype), Numbers.random(tokens, dtype)
    return lambda: run(numbers).clear()  # results of gigabytes stay where they are


def measure(tokens: int, dtype: torch.dtype, turns: int) -> dict[str, dict[str, Any]]:
    """Of each side: seconds of each turn, bytes at the peak, and how far its results are from ours."""
    apart = in_fresh_process(disagreements, tokens, dtype)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Elsewhere()).side(timed_side, name, tokens, dtype) for name in apart
        }
        seconds = take_turns(sides, turns, warmup=0)
    return {
        name: {
            "seconds": seconds[name],
            "bytes": in_fresh_process(memory, name, tokens, dtype),
            "from ours": apart[name],
        }
        for name in seconds
    }


def rows(dtype: str, measured: dict[str, dict[str, Any]]) -> list[list[str]]:
    ours = measured["seqrl"]
    found = []
    for name, said in measured.items():
        memory, largest = said["bytes"] / 2**30, max(said["from ours"].values(), default=0.0)
        times, share = "", ""
        if name != "seqrl":
            times = str(Ratio.of(said["seconds"], ours["seconds"]))
            share = f"{said['bytes'] / ours['bytes']:.1f}"
        found.append(
            [dtype, name, f"{median(said['seconds']):.2f}", times, f"{memory:.2f}", share, f"{largest:.0e}"]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help=f"below {SEQUENCE}, or a multiple of it")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    asked = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    packages = [package for package in PACKAGES if _installed(package)]
    where = setting(*packages, tokens=asked.tokens, hidden=HIDDEN, vocabulary=VOCABULARY, turns=asked.turns)
    numbers = {name: measure(asked.tokens, DTYPES[name], asked.turns) for name in asked.dtype}
    columns = ["type", "", "seconds", "times ours", "GiB at the peak", "times ours", "farthest from ours"]
    lines = [line for name, measured in numbers.items() for line in rows(name, measured)]
    markdown = (
        "# Log-probs and entropies of hidden states, with backward\n\n"
        "Seconds are medians; ratios are taken within each turn: median (lowest to highest). Memory is above "
        "that of the inputs, the gradient of the weight included. The last column is the largest relative "
        "error of a result.\n\n" + table(columns, lines)
    )
    write_results("logprob_head", where, markdown, numbers, directory=asked.out)


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
