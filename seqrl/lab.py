"""`seqrl lab`: several losses on one saved batch and the same weights, and what each would do with them.

A checkpoint holds the batch its step trained on and the weights after it. So the log ratios are what
the step did, and the clips act. Some of the batch's groups, taken as one mini-batch, go through each
loss: the weight it gives each token, its gradient, and what a step along it does to the likelihood of
each response. The terms that losses share (KL, entropy) are left out.

Shape legend: N sequences, T tokens in all, L losses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqrl import checkpoint
from seqrl.algos.segments import segment_mean, segment_sum
from seqrl.compare import settings as paper_settings
from seqrl.config.check import check_train
from seqrl.config.derived import product_dtype
from seqrl.config.load import load
from seqrl.config.loss_keys import ACTOR, LOSS_PARAMETERS, aggregations, setting
from seqrl.config.schema import Config, FSDPConfig
from seqrl.errors import UserError
from seqrl.report.files import METRICS, read_rows
from seqrl.report.lab_page import CLIPS, NOT_CLIPPED, Lab, LabResponse, LossFacts, table, write_lab
from seqrl.training.logprobs import response_statistics
from seqrl.training.model import (
    DTYPES,
    check_flat_forward,
    choose_device,
    load_model,
    load_tokenizer,
)
from seqrl.training.objective import LOSS_MODE, Counts, PolicyObjective
from seqrl.training.packing import by_tokens
from seqrl.types import Batch

USAGE = "lab takes RUN_DIR, --step K, --loss A,B, groups=N and key=value"
STEP = 1e-5
"""Length of a step, as a share of the weights' norm: so small that what it does is proportional to it."""
CLIP_LETTERS = NOT_CLIPPED + "".join(CLIPS)
# What the losses share would blur what tells them apart.
SHARED_OFF = {f"{ACTOR}.use_kl_loss": "false", f"{ACTOR}.entropy_coeff": "0"}
# Settings of a run that are for its own loss alone.
OWN = {f"{ACTOR}.loss_agg_mode": "null", f"{ACTOR}.clip_target_fraction": "null"}


@dataclass(frozen=True)
class Options:
    run_dir: Path
    step: int | None = None
    """None: the newest that is saved."""
    losses: tuple[str, ...] = ("gspo", "vanilla", "geo_mean", "sapo")
    groups: int = 4
    overrides: tuple[str, ...] = ()


def run(arguments: Sequence[str]) -> None:
    """Writes the page and the numbers into the run's directory, and prints a table of them.

    Raises UserError where there is no such run, step, batch or loss, or nothing to learn from.
    """
    options = _options(arguments)
    path = _checkpoint(options)
    whole = checkpoint.load_batch(path)
    batch = informative_groups(whole, options.groups)
    step = int(path.name.removeprefix(checkpoint.PREFIX))
    configs = _configs(options, step)
    objectives = {
        loss: PolicyObjective(config.actor_rollout_ref.actor, config.data.max_response_length)
        for loss, config in configs.items()
    }
    config = next(iter(configs.values()))
    bench, tokenizer = _bench(config, path / "huggingface")

    print(f"{path}: {len(batch)} responses, {int(batch.response_mask.sum())} tokens", flush=True)
    step_length = STEP * _norm([parameter.detach() for parameter in bench.model.parameters()])
    before = bench.likelihoods(batch)
    replays, changes = {}, {}
    for place, (loss, objective) in enumerate(objectives.items(), start=1):
        print(f"{place}/{len(objectives)} {loss}", flush=True)
        replays[loss] = bench.replay(batch, objective)
        with stepped(bench.model, replays[loss].gradient, step_length):
            changes[loss] = bench.likelihoods(batch) - before
    lab = Lab(
        title=config.trainer.experiment_name,
        step=step,
        groups_in_batch=whole.group.unique().numel(),
        step_length=step_length,
        relative_step=STEP,
        losses=tuple(_facts(configs[loss], batch, replay) for loss, replay in replays.items()),
        cosine=cosines([replay.gradient for replay in replays.values()]),
        responses=tuple(_responses(tokenizer, batch, before, replays, changes)),
    )
    page = write_lab(options.run_dir, lab)
    print("\n".join(table(lab)))
    print(f"page: {page}")


def _options(arguments: Sequence[str]) -> Options:
    given: dict[str, Any] = {}
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--step", "--loss"):
            given[name] = value if equals else next(rest, "")
        elif argument.startswith("-"):
            raise UserError(f"unknown option {name}; {USAGE}")
        elif name == "groups" and equals:
            given[name] = value
        elif not equals or Path(argument).is_dir():
            if "run_dir" in given:
                raise UserError(f"two directories, {given['run_dir']} and {argument}; {USAGE}")
            given["run_dir"] = Path(os.path.expanduser(argument))
        else:
            overrides.append(argument)
    if "run_dir" not in given:
        raise UserError(f"which run? {USAGE}")
    options = Options(given["run_dir"], overrides=tuple(overrides))
    if "--step" in given:
        options = replace(options, step=_whole_number("--step", given["--step"], least=0))
    if "groups" in given:
        options = replace(options, groups=_whole_number("groups", given["groups"], least=1))
    if "--loss" in given:
        names = tuple(dict.fromkeys(name.strip() for name in given["--loss"].split(",") if name.strip()))
        if not names:
            raise UserError("--loss names no loss; write for example --loss gspo,vanilla")
        options = replace(options, losses=names)
    return options


def _whole_number(name: str, text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text}: write a whole number from {least} on")
    return int(text)


def _checkpoint(options: Options) -> Path:
    run_dir = options.run_dir
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such run")
    saved = checkpoint.steps(run_dir)
    if not saved or not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run of seqrl train with a checkpoint (config.yaml, global_step_K)")
    step = saved[-1] if options.step is None else options.step
    if step not in saved:
        raise UserError(f"--step {step} is not saved in {run_dir}; there are {', '.join(map(str, saved))}")
    return run_dir / f"{checkpoint.PREFIX}{step}"


def _configs(options: Options, step: int) -> dict[str, Config]:
    """The run's config with each loss: the run's own as it was in this step, the others with their papers'
    settings, and over them the command line's."""
    run = [f"--config-path={options.run_dir}"]
    trained = load(Config, run, default_name="config").actor_rollout_ref.actor.policy_loss.loss_mode
    configs = {}
    for loss in options.losses:
        own = _moved_clip_range(options.run_dir, step)
        settings = SHARED_OFF | (own if loss == trained else OWN | paper_settings(loss))
        arguments = [*run, *(f"{key}={value}" for key, value in settings.items()), *options.overrides]
        config = load(Config, [*arguments, f"{LOSS_MODE}={loss}"], default_name="config")
        try:
            check_train(config)
        except UserError as error:
            if options.losses != Options.losses:
                raise
            print(f"without {loss}: {error}")
            continue
        if config.actor_rollout_ref.actor.use_kl_loss or config.actor_rollout_ref.actor.entropy_coeff:
            raise UserError(f"{', '.join(SHARED_OFF)}: lab compares policy losses alone; leave these out")
        configs[loss] = config
    return configs


def _moved_clip_range(run_dir: Path, step: int) -> dict[str, str]:
    """The clip range that held in this step, by key, where auto clip moved it."""
    row = next((row for row in read_rows(run_dir / METRICS) if row["step"] == step), {})
    names = {side: f"actor/clip_{side}" for side in ("low", "high")}
    return {f"{ACTOR}.clip_ratio_{side}": str(row[name]) for side, name in names.items() if name in row}


def _bench(config: Config, directory: Path) -> tuple[Bench, Any]:
    """The checkpoint's weights, in float32 so that a small step can be taken from them, and its tokenizer."""
    actor = config.actor_rollout_ref.actor
    model_config, key = replace(config.actor_rollout_ref.model, path=str(directory)), "RUN_DIR"
    tokenizer = load_tokenizer(model_config, key=key)
    device = choose_device(config.trainer.device)
    model = load_model(model_config, FSDPConfig(model_dtype="fp32"), device, key=key)
    check_flat_forward(model)
    bench = Bench(
        model,
        temperature=config.actor_rollout_ref.rollout.temperature,
        compute_dtype=DTYPES[product_dtype(actor.fsdp_config)],
        max_tokens=actor.ppo_max_token_len_per_gpu,
    )
    return bench, tokenizer


def informative_groups(batch: Batch, count: int) -> Batch:
    """The sequences of `count` groups in which a response token has an advantage other than 0; all of these
    where there are fewer. They are spread over the batch, whose mini-batches differ in how far they moved.

    Raises UserError where there is none.
    """
    assert batch.advantages is not None
    if not batch.response_mask.any():
        raise UserError("the batch of this step has no response text: all responses are empty")
    pushed = (batch.advantages != 0) & batch.response_mask
    groups = batch.group[segment_sum(pushed.long(), batch.offsets) > 0].unique()
    if not groups.numel():
        raise UserError(
            "every response of this step has advantage 0, and no loss a gradient; try another --step"
        )
    places = torch.linspace(0, groups.numel() - 1, min(count, groups.numel())).round().long()
    return batch.select(torch.isin(batch.group, groups[places]).nonzero()[:, 0])


@dataclass(frozen=True)
class Replay:
    """What one loss makes of a batch; all [T], on the CPU, 0 outside the responses."""

    loss: float
    weights: Tensor
    """-N |y_i| times the derivative of the aggregated loss by the token's log-prob: how hard it is pushed
    up. REINFORCE at ratio 1 under `seq-mean-token-mean` gives each token its advantage."""
    clips: Tensor
    """int64: the place of a token's letter in `CLIP_LETTERS`."""
    logprobs: Tensor
    gradient: list[Tensor]
    """Of the model's parameters, in their order."""


@dataclass(frozen=True)
class Bench:
    """The model that all losses are tried on, and how it is run."""

    model: Any
    temperature: float
    compute_dtype: torch.dtype
    """Of the forward behind ratios and gradients: that of the run, whose old log-probs they meet."""
    max_tokens: int
    """Tokens per micro-batch."""

    def replay(self, batch: Batch, objective: PolicyObjective) -> Replay:
        """The batch as one mini-batch through a loss, forward and backward; no step is taken."""
        batch = objective.prepared(batch)
        counts, loss = Counts.of(batch), 0.0
        pushes, logprobs = torch.zeros(2, batch.tokens.numel(), dtype=torch.float64)
        clips = torch.zeros_like(batch.tokens)
        self.model.zero_grad(set_to_none=True)
        for part, at in self._micro_batches(batch):
            with self._autocast():
                said = response_statistics(self.model, part, temperature=self.temperature, entropy=True)
            assert said.entropy is not None
            said.logprobs.retain_grad()
            share, diagnostics = objective(said.logprobs, said.entropy, part, counts)
            share.backward()
            assert said.logprobs.grad is not None
            loss += float(share.detach())
            pushes[at] = -said.logprobs.grad.double().cpu()
            logprobs[at] = said.logprobs.detach().double().cpu()
            kinds = (diagnostics.clipped_low, diagnostics.clipped_high, diagnostics.clipped_dual)
            clips[at] = torch.stack([i * kind.long() for i, kind in enumerate(kinds, start=1)]).amax(0).cpu()
        scale = len(batch) * batch.response_lengths.repeat_interleave(batch.lengths)
        gradient = [
            torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu()
            for p in self.model.parameters()
        ]
        self.model.zero_grad(set_to_none=True)
        return Replay(loss, pushes * scale, clips, logprobs, gradient)

    @torch.no_grad()
    def likelihoods(self, batch: Batch) -> Tensor:
        """log p(y_i | x_i), nats: [N] float64. In float32 throughout, since what counts is small changes."""
        logprobs = torch.zeros(batch.tokens.numel(), dtype=torch.float64)
        for part, at in self._micro_batches(batch):
            said = response_statistics(self.model, part, temperature=self.temperature)
            logprobs[at] = said.logprobs.double().cpu()
        return segment_sum(logprobs, batch.offsets)

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Each with the places of its response tokens in `batch`."""
        for indices in by_tokens(batch.lengths.tolist(), self.max_tokens):
            yield batch.select(indices), batch.response_token_index(indices)

    def _autocast(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.model.device.type, self.compute_dtype, enabled=enabled)


@contextmanager
def stepped(model: Any, gradient: Sequence[Tensor], length: float) -> Iterator[None]:
    """`model` a step of this length against `gradient`; afterwards it is bit by bit what it was.

    A gradient that is 0 makes no step.
    """
    norm = _norm(gradient)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), gradient, strict=True):
                parameter.sub_(slope.to(parameter.device), alpha=length / norm if norm else 0.0)
        yield
    finally:
        with torch.no_grad():
            for parameter, saved in zip(model.parameters(), before, strict=True):
                parameter.copy_(saved)


def cosines(gradients: Sequence[Sequence[Tensor]]) -> tuple[tuple[float, ...], ...]:
    """Between each pair of gradients: [L][L]; not a number where one is 0."""
    products = [[_dot(a, b) for b in gradients[: i + 1]] for i, a in enumerate(gradients)]
    norms = [row[-1] ** 0.5 for row in products]

    def cosine(i: int, j: int) -> float:
        return products[max(i, j)][min(i, j)] / (norms[i] * norms[j]) if norms[i] * norms[j] else math.nan

    return tuple(tuple(cosine(i, j) for j in range(len(norms))) for i in range(len(norms)))


def _norm(gradient: Sequence[Tensor]) -> float:
    return _dot(gradient, gradient) ** 0.5


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """In float64, parameter by parameter."""
    return sum(float(x.double().flatten() @ y.double().flatten()) for x, y in zip(a, b, strict=True))


def _facts(config: Config, batch: Batch, replay: Replay) -> LossFacts:
    actor = config.actor_rollout_ref.actor
    loss, clips = actor.policy_loss.loss_mode, replay.clips[batch.response_mask]
    low, high, dual = ((clips == place).double().mean().item() for place in (1, 2, 3))
    off = ((replay.clips == 1) | (replay.clips == 2)).long()
    return LossFacts(
        name=loss,
        settings={name: setting(actor, name) for name in LOSS_PARAMETERS.get(loss, ())},
        aggregation=actor.loss_agg_mode or aggregations(loss)[0],
        loss=replay.loss,
        clipped_low=low,
        clipped_high=high,
        clipped_dual=dual,
        clipped_sequences=(segment_sum(off, batch.offsets) > 0).double().mean().item(),
        grad_norm=_norm(replay.gradient),
    )


def _responses(
    tokenizer: Any,
    batch: Batch,
    likelihoods: Tensor,
    replays: Mapping[str, Replay],
    changes: Mapping[str, Tensor],
) -> Iterator[LabResponse]:
    assert batch.old_logprobs is not None and batch.advantages is not None
    logprobs = next(iter(replays.values())).logprobs
    mask, offsets = batch.response_mask, batch.response_offsets
    log_ratios = (logprobs - batch.old_logprobs)[mask]
    sequence_ratios = segment_mean(log_ratios, offsets).exp()
    advantages = segment_mean(batch.advantages[mask], offsets)
    for i in range(len(batch)):
        own, answer = slice(*batch.offsets[i : i + 2].tolist()), slice(*offsets[i : i + 2].tolist())
        prompt = batch.tokens[own][: int(mask[own].long().argmax()) if mask[own].any() else None]

        def of(column: Tensor, answer: slice = answer) -> tuple[float, ...]:
            return tuple(column[mask][answer].tolist())

        yield LabResponse(
            group=int(batch.group[i]),
            prompt=tokenizer.decode(prompt.tolist()),
            tokens=tuple(token_texts(tokenizer, batch.tokens[mask][answer].tolist())),
            reward=float(batch.reward[i]),
            advantage=float(advantages[i]),
            logprob=float(likelihoods[i]),
            sequence_ratio=float(sequence_ratios[i]),
            logprobs=of(logprobs),
            log_ratios=tuple(log_ratios[answer].tolist()),
            weights={loss: of(replay.weights) for loss, replay in replays.items()},
            clipped={
                loss: "".join(CLIP_LETTERS[int(clip)] for clip in of(replay.clips))
                for loss, replay in replays.items()
            },
            change={loss: float(change[i]) for loss, change in changes.items()},
        )


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text each token adds to those before it; a character of several tokens goes to its last one."""
    texts: list[str] = []
    start = read = 0  # decoding begins at `start`; up to `read` the text is told
    for end in range(1, len(tokens) + 1):
        told, text = tokenizer.decode(tokens[start:read]), tokenizer.decode(tokens[start:end])
        whole = not text.endswith("\ufffd") or end - read == 4  # no character has more bytes
        texts.append(text[len(told) :] if whole else "")
        if whole:
            start, read = read, end
    return texts
