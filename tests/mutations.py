"""Breaks every policy loss on purpose, one way at a time, and reports which test notices.

    python tests/mutations.py [--losses gspo sapo]      (or: make mutations; some minutes on one core)

Each mutation is an exact replacement in a copy of seqrl and its tests (the checkout is never touched), tried
against the tests of that loss. One that no test kills is a hole in the tests: it is reported as SURVIVED, and
the exit status is 1. A mutation whose source is gone is an error: rewrite it here.

Left out, as they change nothing: a stop-gradient around a comparison; and `logprobs.detach()` dropped
altogether in `gspo` and `geo_mean`, whose gradient then takes the other way round to the same sum, one
advantage being common to the sequence (`gspo_token`, where it is not, has that mutation).
"""

from __future__ import annotations

import argparse
import ast
import gc
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 120.0  # seconds; a mutation that makes the tests hang is noticed, too

FORMULA = (
    "tests/algos/test_clip_range_sides.py",
    "tests/algos/test_losses.py",
    "tests/algos/test_losses_covariance.py",
    "tests/algos/test_policy_gradient.py",
    "tests/algos/test_loss_gradients.py",
    "tests/algos/test_loss_invariances.py",
)
EACH_LOSS = ("tests/training/test_each_loss.py",)
SPLIT = ("tests/training/test_split_invariance.py",)
ENGINE_ONLY = "engines_weights"


@dataclass(frozen=True)
class Edit:
    """`old`, which must stand exactly once in the function (or class) `within`, becomes `new`."""

    file: str
    within: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        path = root / "seqrl" / self.file
        lines = path.read_text().splitlines(keepends=True)
        node = next(
            (x for x in ast.walk(ast.parse("".join(lines))) if getattr(x, "name", None) == self.within), None
        )
        if node is None:
            raise SystemExit(f"{self.file} has no {self.within} any more: rewrite the mutation")
        start, end = node.lineno - 1, node.end_lineno
        body = "".join(lines[start:end])
        if body.count(self.old) != 1:
            raise SystemExit(
                f"{self.file}, {self.within}: {body.count(self.old)} times {self.old!r}, not once: "
                "rewrite the mutation"
            )
        path.write_text("".join([*lines[:start], body.replace(self.old, self.new), *lines[end:]]))


@dataclass(frozen=True)
class Mutation:
    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...] = FORMULA
    only: str = ""
    """A further word that the names of the tests must have."""


def mutate(
    what: str,
    file: str,
    within: str,
    *pairs: tuple[str, str],
    tests: tuple[str, ...] = FORMULA,
    only: str = "",
) -> Mutation:
    return Mutation(what, tuple(Edit(file, within, old, new) for old, new in pairs), tests, only)


SEQUENCE, TOKEN, COVARIANCE = (f"algos/losses/{name}.py" for name in ("sequence", "token", "covariance"))
NEVER = "torch.zeros_like(advantages, dtype=torch.bool)"

# What goes for every loss: it is not in the loss itself, but each must have a test that tells.

MASK_DROPPED = mutate(
    "mask dropped: log-probs of prompt and masked tokens enter",
    "training/local.py",
    "LocalEngine",
    (
        "part = mini_batch.select(indices)",
        "part = mini_batch.select(indices)\n"
        "            part = __import__('dataclasses').replace("
        "part, response_mask=torch.ones_like(part.response_mask))",
    ),
    tests=EACH_LOSS,
)
COUNTS_OF_PART = mutate(
    "counts of the micro-batch, in the engine",
    "training/local.py",
    "LocalEngine",
    (
        "objective(said.logprobs, said.entropy, part, counts,",
        "objective(said.logprobs, said.entropy, part, Counts.of(part),",
    ),
    tests=SPLIT,
    only=ENGINE_ONLY,
)
COUNTS_IN_OBJECTIVE = mutate(
    "counts of the micro-batch, in the objective",
    "training/objective.py",
    "PolicyObjective",
    (
        "loss = self._aggregate(values, offsets, counts)",
        "loss = self._aggregate(values, offsets, Counts.of(part))",
    ),
    tests=SPLIT,
)
TOKEN_MEAN_SUMS = mutate(
    "length normalisation dropped: token-mean sums",
    "algos/aggregate.py",
    "token_mean",
    ("values.sum() / max(tokens, 1)", "values.sum()"),
    tests=EACH_LOSS,
)
SEQUENCE_MEAN_SUMS = mutate(
    "length normalisation dropped: seq-mean-token-mean sums",
    "algos/aggregate.py",
    "seq_mean_token_mean",
    ("segment_mean(values, offsets).sum()", "values.sum()"),
    tests=(*EACH_LOSS, *FORMULA),
)
SEQUENCES_NOT_COUNTED = mutate(
    "number of sequences dropped: seq-mean-token-mean",
    "algos/aggregate.py",
    "seq_mean_token_mean",
    (".sum() / sequences", ".sum()"),
    tests=(*EACH_LOSS, *FORMULA),
)
WEIGHTS_DROPPED = mutate(
    "rollout correction's weights dropped",
    "training/objective.py",
    "PolicyObjective",
    ("values = values * of_tokens(part.weights)", "values = values * 1"),
    tests=EACH_LOSS,
)
SELECTED_PER_PART = mutate(
    "selection made for each micro-batch",
    "training/local.py",
    "LocalEngine",
    (
        "part = mini_batch.select(indices)",
        "part = objective.prepared(mini_batch.select(indices))",
    ),
    tests=SPLIT,
    only=ENGINE_ONLY,
)

# PPO's clip, in `base.clipped`: gspo, gspo_token, vanilla and clip_cov.


def in_clipped(what: str, *pairs: tuple[str, str]) -> Mutation:
    return mutate(what, "algos/losses/base.py", "clipped", *pairs)


LOW = "clipped_low = (advantages < 0) & (ratio < 1 - clip_low)"
HIGH = "clipped_high = (advantages > 0) & (ratio > 1 + clip_high)"
DUAL = "clipped_dual = (advantages < 0) & (ratio > clip_c)"
PPO_CLIP = (
    in_clipped("sign flipped", ("Surrogate(-advantages * bounded", "Surrogate(advantages * bounded")),
    in_clipped(
        "clip side swapped",
        (LOW, LOW.replace("advantages < 0", "advantages > 0")),
        (HIGH, HIGH.replace("advantages > 0", "advantages < 0")),
    ),
    in_clipped(
        "low and high range swapped",
        (LOW, LOW.replace("clip_low)", "clip_high)")),
        (HIGH, HIGH.replace("+ clip_high", "+ clip_low")),
    ),
    in_clipped("no lower clip", (LOW, f"clipped_low = {NEVER}")),
    in_clipped("no upper clip", (HIGH, f"clipped_high = {NEVER}")),
    in_clipped(
        "clipped low, without its constant", ("torch.where(clipped_low, 1 - clip_low, bounded)", "bounded")
    ),
    in_clipped(
        "clipped high, without its constant", ("torch.where(clipped_high, 1 + clip_high, bounded)", "bounded")
    ),
    in_clipped(
        "clipped tokens keep their gradient",
        (
            "exp_or_tangent(torch.where(no_gradient, torch.zeros_like(log_ratio), log_ratio))",
            "exp_or_tangent(log_ratio - log_ratio.detach() * no_gradient)",
        ),
        (
            "torch.where(clipped_low, 1 - clip_low, bounded)",
            "torch.where(clipped_low, (1 - clip_low) * bounded, bounded)",
        ),
        (
            "torch.where(clipped_high, 1 + clip_high, bounded)",
            "torch.where(clipped_high, (1 + clip_high) * bounded, bounded)",
        ),
    ),
)
DUAL_CLIP = (
    in_clipped("no dual clip", (DUAL, f"clipped_dual = {NEVER}")),
    in_clipped("dual clip on the wrong side", (DUAL, DUAL.replace("advantages < 0", "advantages > 0"))),
    in_clipped("dual clip, without its constant", ("torch.where(clipped_dual, clip_c, bounded)", "bounded")),
)


def in_gspo(what: str, *pairs: tuple[str, str]) -> Mutation:
    return mutate(what, SEQUENCE, "gspo", *pairs)


GSPO_MEAN = "segment_mean(current - old_logprobs, offsets)"
GSPO = (
    *PPO_CLIP,
    *DUAL_CLIP,
    in_gspo("length normalisation dropped from log s", (GSPO_MEAN, f"({GSPO_MEAN} * offsets.diff())")),
    in_gspo("stop-gradient dropped from s", ("segment_mean(current - old", "segment_mean(logprobs - old")),
    in_gspo("no gradient through the token", ("log_ratio + (logprobs - current)", "log_ratio")),
    in_gspo(
        "ratio turned upside down",
        ("segment_mean(current - old_logprobs", "segment_mean(old_logprobs - current"),
    ),
)


def in_geo_mean(what: str, *pairs: tuple[str, str]) -> Mutation:
    return mutate(what, SEQUENCE, "geo_mean", *pairs)


GEO_LOW = "clipped_low = (advantages < 0) & (log_ratio < -clip_low)"
GEO_HIGH = "clipped_high = (advantages > 0) & (log_ratio > clip_high)"
GEO_BOUNDED = "torch.where(clipped_low, -clip_low, torch.where(clipped_high, clip_high, log_ratio))"
GEO_MEAN = (
    in_geo_mean("sign flipped", ("-advantages * exp_or_tangent", "advantages * exp_or_tangent")),
    in_geo_mean(
        "length normalisation dropped from the mean",
        ("segment_mean(bounded, offsets)", "(segment_mean(bounded, offsets) * offsets.diff())"),
    ),
    in_geo_mean(
        "clip side swapped",
        (GEO_LOW, GEO_LOW.replace("advantages < 0", "advantages > 0")),
        (GEO_HIGH, GEO_HIGH.replace("advantages > 0", "advantages < 0")),
    ),
    in_geo_mean(
        "low and high range swapped",
        (GEO_LOW, GEO_LOW.replace("-clip_low", "-clip_high")),
        (GEO_HIGH, GEO_HIGH.replace("> clip_high", "> clip_low")),
    ),
    in_geo_mean("no lower clip", (GEO_LOW, f"clipped_low = {NEVER}")),
    in_geo_mean("no upper clip", (GEO_HIGH, f"clipped_high = {NEVER}")),
    in_geo_mean("clipped, without the constants", (GEO_BOUNDED, "log_ratio")),
    in_geo_mean("stop-gradient dropped from the mean", ("current - old_logprobs", "logprobs - old_logprobs")),
    in_geo_mean(
        "clipped tokens keep their gradient",
        (
            "torch.where(clipped_low | clipped_high, torch.zeros_like(mean), logprobs - current)",
            "logprobs - current",
        ),
    ),
)


def in_token(within: str, what: str, *pairs: tuple[str, str]) -> Mutation:
    return mutate(what, TOKEN, within, *pairs)


SAPO = (
    in_token("sapo", "sign flipped", ("-advantages * torch.sigmoid", "advantages * torch.sigmoid")),
    in_token("sapo", "sides swapped", ("advantages > 0", "advantages < 0")),
    in_token(
        "sapo", "temperature dropped from the gate", ("sigmoid(tau * (ratio - 1))", "sigmoid(ratio - 1)")
    ),
    in_token("sapo", "temperature dropped from the slope", ("(ratio - 1)) * 4 / tau", "(ratio - 1)) * 4")),
    in_token("sapo", "no clamp", (".clamp(max=SATURATED)", "")),
)
CISPO_LOW, CISPO_HIGH = "ratio < 1 - clip_low", "ratio > 1 + clip_high"
CISPO = (
    in_token("cispo", "sign flipped", ("Surrogate(-weight", "Surrogate(weight")),
    in_token(
        "cispo", "stop-gradient dropped", ("logprobs.detach() - old_logprobs", "logprobs - old_logprobs")
    ),
    in_token("cispo", "no clip", ("ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio")),
    in_token("cispo", "no lower clip", ("clamp(1 - clip_low, 1 + clip_high)", "clamp(max=1 + clip_high)")),
    in_token(
        "cispo",
        "low and high range swapped",
        ("clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)"),
    ),
    in_token("cispo", "told on the wrong side", (f"{CISPO_LOW}, {CISPO_HIGH}", f"{CISPO_HIGH}, {CISPO_LOW}")),
)
GPG = (in_token("gpg", "sign flipped", ("-advantages * logprobs", "advantages * logprobs")),)
DPPO_LOW = "low = (advantages < 0) & (log_ratio < 0) & (divergence > clip_low)"
DPPO_HIGH = "high = (advantages > 0) & (log_ratio > 0) & (divergence > clip_high)"
DPPO = (
    in_token("_within", "sign flipped", ("Surrogate(-weight", "Surrogate(weight")),
    in_token(
        "_within",
        "clip side swapped",
        (DPPO_LOW, DPPO_LOW.replace("advantages < 0", "advantages > 0")),
        (DPPO_HIGH, DPPO_HIGH.replace("advantages > 0", "advantages < 0")),
    ),
    in_token(
        "_within",
        "thresholds swapped",
        (DPPO_LOW, DPPO_LOW.replace("> clip_low", "> clip_high")),
        (DPPO_HIGH, DPPO_HIGH.replace("> clip_high", "> clip_low")),
    ),
    in_token("_within", "no lower threshold", (DPPO_LOW, f"low = {NEVER}")),
    in_token("_within", "no upper threshold", (DPPO_HIGH, f"high = {NEVER}")),
    in_token("_within", "cut on the way back, too", (DPPO_LOW, DPPO_LOW.replace(" & (log_ratio < 0)", ""))),
    in_token("_within", "no truncation", ("ratio.clamp(max=clip_c)", "ratio")),
    in_token(
        "_within", "stop-gradient dropped", ("logprobs.detach() - old_logprobs", "logprobs - old_logprobs")
    ),
)
DPPO_TV = in_token(
    "dppo_tv",
    "divergence of ratios",
    ("logprobs.detach().exp() - old_logprobs.exp()", "logprobs.detach() - old_logprobs"),
)
DPPO_KL = in_token(
    "dppo_kl", "divergence the other way round", ("(old_rest / rest).log()", "(rest / old_rest).log()")
)
DRO = (
    in_token("dro", "sign of the advantage flipped", ("-advantages * log_ratio", "advantages * log_ratio")),
    in_token("dro", "sign of the square flipped", ("+ dro_beta / 2", "- dro_beta / 2")),
    in_token("dro", "square dropped", (" + dro_beta / 2 * log_ratio.square()", "")),
    in_token("dro", "half dropped", ("dro_beta / 2", "dro_beta")),
    in_token(
        "dro",
        "no pull without an advantage",
        ("log_ratio.square()", "log_ratio.square() * (advantages != 0)"),
    ),
)


def in_covariance(within: str, what: str, *pairs: tuple[str, str]) -> Mutation:
    return mutate(what, COVARIANCE, within, *pairs)


COVARIANCE_OF = (
    in_covariance(
        "_covariance", "sign of the covariance flipped", ("return (advantages", "return -(advantages")
    ),
    in_covariance("_covariance", "mean log-prob dropped", ("(logprobs - logprobs.mean())", "logprobs")),
    in_covariance(
        "_covariance", "mean advantage dropped", ("(advantages - advantages.mean())", "advantages")
    ),
    SELECTED_PER_PART,
)
CLIP_COV = (
    *PPO_CLIP,
    *COVARIANCE_OF,
    in_covariance(
        "clip_cov",
        "selected tokens keep their gradient",
        ("advantages.masked_fill(selected, 0)", "advantages"),
    ),
    in_covariance("select_clip_cov", "no lower bound", ("(covariance > clip_cov_lb) & ", "")),
    in_covariance("select_clip_cov", "no upper bound", (" & (covariance < clip_cov_ub)", "")),
    in_covariance(
        "select_clip_cov",
        "picked by place, not at random",
        (
            "eligible[order[: _count(covariance, clip_cov_ratio)]]",
            "eligible[: _count(covariance, clip_cov_ratio)]",
        ),
    ),
    in_covariance(
        "select_clip_cov",
        "another pick each time",
        ("torch.Generator().manual_seed(int(covariance.view(torch.int32).sum()))", "None"),
    ),
)
KL_COV = (
    *COVARIANCE_OF,
    in_covariance("kl_cov", "sign flipped", ("unclipped(-advantages", "unclipped(advantages")),
    in_covariance("kl_cov", "sign of the pull flipped", ("+ pull", "- pull")),
    in_covariance("kl_cov", "pull without its magnitude", ("log_ratio.abs()", "log_ratio")),
    in_covariance(
        "kl_cov",
        "all tokens pulled",
        ("torch.where(selected, ppo_kl_coef * log_ratio.abs(), 0)", "ppo_kl_coef * log_ratio.abs()"),
    ),
    in_covariance(
        "kl_cov", "no pull without an advantage", ("where(selected,", "where(selected & (advantages != 0),")
    ),
    in_covariance("select_kl_cov", "the least picked", ("covariance.topk(", "(-covariance).topk(")),
)

OF_LOSS: dict[str, tuple[Mutation, ...]] = {
    "gspo": GSPO,
    "gspo_token": (
        *GSPO,
        in_gspo("stop-gradient dropped altogether", ("logprobs.detach()", "logprobs")),
        mutate(
            "low and high handed over the wrong way round",
            SEQUENCE,
            "gspo_token",
            ("clip_low=clip_low", "clip_low=clip_high"),
            ("clip_high=clip_high", "clip_high=clip_low"),
        ),
    ),
    "vanilla": (
        *PPO_CLIP,
        *DUAL_CLIP,
        in_token(
            "vanilla", "ratio turned upside down", ("logprobs - old_logprobs", "old_logprobs - logprobs")
        ),
    ),
    "geo_mean": GEO_MEAN,
    "sapo": SAPO,
    "cispo": CISPO,
    "gpg": GPG,
    "clip_cov": CLIP_COV,
    "kl_cov": KL_COV,
    "dppo_tv": (*DPPO, DPPO_TV),
    "dppo_kl": (*DPPO, DPPO_KL),
    "dro": DRO,
}
BY_SEQUENCE = ("gspo", "gspo_token", "geo_mean", "sapo")
"""The losses whose own aggregation is `seq-mean-token-mean`; that of the others is `token-mean`."""


def mutations_of(loss: str) -> Iterator[Mutation]:
    yield from OF_LOSS[loss]
    yield MASK_DROPPED
    yield from (SEQUENCE_MEAN_SUMS, SEQUENCES_NOT_COUNTED) if loss in BY_SEQUENCE else (TOKEN_MEAN_SUMS,)
    yield from (COUNTS_OF_PART, COUNTS_IN_OBJECTIVE, WEIGHTS_DROPPED)


@contextmanager
def applied(mutation: Mutation, root: Path) -> Iterator[None]:
    before = {path: path.read_text() for path in {root / "seqrl" / edit.file for edit in mutation.edits}}
    try:
        for edit in mutation.edits:
            edit.apply(root)
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


class FirstFailure:
    """A pytest plugin."""

    test = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid.split("/")[-1]


def run_tests(root: Path, tests: tuple[str, ...], words: str, answer: Any) -> None:
    """In a process of its own: (pytest's exit status, the first test that failed, what pytest printed)."""
    import pytest

    os.chdir(root)
    sys.path.insert(0, str(root))
    import seqrl

    assert Path(seqrl.__file__).is_relative_to(root), "the tests must see the copy"
    first, printed = FirstFailure(), io.StringIO()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", words]
    with redirect_stdout(printed), redirect_stderr(printed):
        status = pytest.main([*options, *tests], plugins=[first])
    answer.send((int(status), first.test, printed.getvalue()))


def outcome(root: Path, tests: tuple[str, ...], words: str) -> tuple[int, str, str]:
    """`run_tests` forked off, so that torch and transformers are imported once for all."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(root, tests, words, send))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(TIME_LIMIT) else (1, "(none: it ran out of time)", "")
    except EOFError:
        return 1, "(none: the process died)", ""
    finally:
        process.kill()
        process.join()


def words_of(loss: str, mutation: Mutation) -> str:
    """For pytest's -k: the tests of this loss alone, and those that put every loss to the same question."""
    words = f"({loss} and not gspo_token)" if loss == "gspo" else loss
    words = f"({words} or loss_invariances)"
    return f"{words} and {mutation.only}" if mutation.only else words


def copy_of_checkout(directory: str) -> Path:
    root = Path(directory).resolve()
    for name in ("seqrl", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def import_once() -> None:
    """What every child would import anyway; never seqrl, which is each child's own."""
    import hypothesis
    import pytest
    import torch
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    torch.set_num_threads(1)
    gc.freeze()  # what is imported here need not be searched by every child
    assert hypothesis and pytest and modeling_qwen3_moe and "seqrl" not in sys.modules


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--losses", nargs="+", choices=OF_LOSS, default=[*OF_LOSS])
    losses = parser.parse_args().losses
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    start, survived, count = time.monotonic(), [], 0
    import_once()
    with tempfile.TemporaryDirectory() as directory:
        root = copy_of_checkout(directory)
        for mutation in (mutation for loss in OF_LOSS for mutation in mutations_of(loss)):
            with applied(mutation, root):
                pass  # all can be made, else none is worth a wait
        status, test, printed = outcome(root, (*FORMULA, *EACH_LOSS, *SPLIT), "not any_split_gives")
        if status:
            raise SystemExit(f"{printed}\nthe tests fail without any mutation: {test}")
        sys.dont_write_bytecode = True  # a cached module could hide a mutation made within the same second
        print("| loss | mutation | killed by |\n|---|---|---|", flush=True)
        for loss in losses:
            for mutation in mutations_of(loss):
                with applied(mutation, root):
                    status, test, printed = outcome(root, mutation.tests, words_of(loss, mutation))
                if status not in (0, 1):
                    raise SystemExit(f"{printed}\n{loss}, {mutation.what}: pytest ended with {status}")
                count += 1
                if status == 0:
                    survived.append(f"{loss}: {mutation.what}")
                print(f"| {loss} | {mutation.what} | {test if status else '**SURVIVED**'} |", flush=True)
    print(
        f"\n{count} mutations, {len(survived)} survived, {time.monotonic() - start:.0f} s",
        *survived,
        sep="\n",
    )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
