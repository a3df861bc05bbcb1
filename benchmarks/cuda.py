"""What a GPU gets done: the update and decoding of Qwen3-0.6B's shape with random weights, in bfloat16.

    python -m benchmarks.cuda [--profile]

First a small model has to agree with itself and with transformers: log-probs of decoding (with CUDA graphs
and without) with those of training, and the gradient of an update with that of a padded transformers forward
in float32. Where they do not, nothing is measured.

- Update: a micro-batch of 16,384 tokens, 16 sequences in groups of 8 with prompts of 128 tokens, weights in
  float32, products in bfloat16. MFU is useful arithmetic as in `benchmarks.update` over the time of forward,
  backward and gradient norm, and over the peak: that of large bfloat16 products on this device, measured in
  the same run, and that of its data sheet. The optimizer step has a column of its own.
- Decoding: 256 responses of 512 tokens to 32 prompts of 512. The bound is what has to be read: all weights
  once a step, and of each row the keys and values that it has by then, over the bandwidth of a large copy on
  this device. The prompts' forward is timed by itself and taken off.

Medians of turns. `--profile` writes which kernels took the time. Without CUDA it ends with code 2.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import RESULTS, setting, table, write_results
from benchmarks.update import CLIP, PaddedPart, gspo, random_batch, useful_flops
from seqrl.config.schema import OptimConfig
from seqrl.reward import Reward
from seqrl.rollout.native import NativeEngine
from seqrl.training.local import LocalEngine
from seqrl.training.packing import ATTENTION_NAME, register
from seqrl.types import Batch, Prompt, SamplingParams

QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SMALL = {
    **QWEN3_06B,
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.08,  # log-probs far from uniform, so that a wrong position or head shows
}
GROUP = 8
SHEETS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}
"""FLOP/s of dense bfloat16 products and bytes/s of memory, by a part of the device's name (SXM)."""
FURTHEST = {"log-probs": 0.05, "graphs": 0.05, "gradient": 0.1}
"""How far two sides may be apart: four times what rounding to bfloat16 makes; a mistake makes more."""


@dataclass(frozen=True)
class Work:
    shape: Mapping[str, Any]
    sequences: int
    prompt: int
    response: int
    """Tokens of each in an update."""
    rows: int
    decode_prompt: int
    new_tokens: int


FULL = Work(QWEN3_06B, 16, 128, 896, 256, 512, 512)
TINY = Work({**SMALL, "num_hidden_layers": 1}, 8, 8, 16, 8, 16, 12)


class NoText:
    eos_token_id = 0

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [""] * len(rows)


def make_model(shape: Mapping[str, Any], device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    register()
    torch.manual_seed(0)
    with device:
        config = Qwen3Config(**shape, pad_token_id=None, bos_token_id=None, eos_token_id=0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).train()


def training(model: Any, dtype: torch.dtype) -> LocalEngine:
    return LocalEngine(
        model,
        None,
        optim=OptimConfig(lr=0.0),
        total_steps=1,
        grad_clip=1.0,
        temperature=1.0,
        compute_dtype=dtype,
        max_tokens=16_384,
        micro_batch_size=None,
        with_reference=False,
    )


def prompts_of(count: int, tokens: int, vocabulary: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, vocabulary, (count, tokens), generator=generator).tolist()
    return [Prompt(f"p:{i}", "", (), "", {}, tuple(row)) for i, row in enumerate(rows)]


# Agreement


def agreement(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far apart the sides are, by the names of `FURTHEST`."""
    model = make_model(SMALL, device)
    prompts = [replace(p, tokens=p.tokens[: 5 + 60 * i]) for i, p in enumerate(prompts_of(6, 320, 1000))]
    sampling = SamplingParams(300, n=5)
    engine = NativeEngine(model, NoText(), max_num_seqs=17, dtype=dtype)
    captured = engine.generate(prompts, sampling, seed=0, policy_version=0)
    again = engine.generate(prompts, sampling, seed=0, policy_version=0)  # every step a replay
    engine.graphs = False
    plain = engine.generate(prompts, sampling, seed=0, policy_version=0)
    batch = Batch.of(again, [Reward(0.0, "")] * len(again))
    mask = batch.response_mask
    said = training(model, dtype).logprobs(batch)
    return {
        "log-probs": float((said - batch.rollout_logprobs)[mask].abs().mean()),
        "graphs": max(apart(captured, again), apart(captured, plain)),
        "gradient": gradient_error(model, dtype),
    }


def apart(ours: list[Any], theirs: list[Any]) -> float:
    """Mean distance of log-probs, as long as both have drawn the same tokens; infinite if that is not half of
    all. (A response is another from the first draw that falls on the boundary between two tokens.)"""
    distances, total = [], 0
    for a, b in zip(ours, theirs, strict=True):
        count = min(len(a.tokens), len(b.tokens))
        same = (a.tokens[:count] == b.tokens[:count]).long().cumprod(0).bool()
        distances.append((a.logprobs[:count] - b.logprobs[:count])[same].abs())
        total += max(len(a.tokens), len(b.tokens))
    alike = torch.cat(distances)
    return float(alike.mean()) if len(alike) > total / 2 else float("inf")


def gradient_error(model: Any, dtype: torch.dtype) -> float:
    """Of an update against transformers with padding in float32, relative to the gradient's norm."""
    lengths = torch.tensor([100, 7, 40, 1, 80, 60, 12, 33] * 2)
    batch = random_batch(lengths, group=GROUP, prompt=50)
    engine = training(model, dtype)
    batch = replace(batch, old_logprobs=engine.logprobs(batch))
    found: list[Tensor] = []
    parameters = list(model.parameters())
    hook = engine.optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.double().flatten() for p in parameters)
    )
    engine.update(batch, gspo())
    hook.remove()
    ours = torch.cat(found)  # the step itself clips

    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    loss = padded_loss(plain, PaddedPart.of(batch), batch)
    theirs = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])
    return float((ours - theirs).norm() / theirs.norm())


def padded_loss(model: Any, part: PaddedPart, batch: Batch) -> Tensor:
    """GSPO of a mini-batch, by its formula."""
    device = model.device
    tokens, mask = part.tokens.to(device), part.response_mask[:, 1:].to(device)
    logits = model(input_ids=tokens, attention_mask=part.attention_mask.to(device), use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    # A ratio of 1 to the last digit: what it is off is rounding, and noise in the gradient of either side.
    ratio = (((logprobs - logprobs.detach()) * mask).sum(1) / mask.sum(1)).exp()
    advantages = part.advantages.to(device)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.min(ratio * advantages, clipped * advantages).sum() / len(batch)


# Time


class Watch:
    """Marks in the device's own time, and the seconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self._on_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def of(self, run: Callable[[], Any]) -> float:
        start = self.mark()
        run()
        return self.seconds(start, self.mark())


def matrix_peak(device: torch.device, size: int) -> float:
    """FLOP/s of square bfloat16 products."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    watch = Watch(device)
    return 2 * size**3 / min(watch.of(lambda: torch.mm(a, b)) for _ in range(10))


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s of a copy, what is read and what is written."""
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    watch = Watch(device)
    return 2 * size / min(watch.of(lambda: target.copy_(source)) for _ in range(10))


def update_seconds(engine: LocalEngine, batch: Batch, turns: int) -> dict[str, float]:
    """Medians: forward and backward, the optimizer step, and a forward alone."""
    watch = Watch(engine.model.device)
    marks: list[Any] = []
    for register_hook in (engine.optimizer.register_step_pre_hook, engine.optimizer.register_step_post_hook):
        register_hook(lambda *_: marks.append(watch.mark()))
    batch, objective = replace(batch, old_logprobs=engine.logprobs(batch)), gspo()
    passes, steps, forwards = list[float](), list[float](), list[float]()
    for turn in range(-2, turns):  # two to warm up
        marks.clear()
        start = watch.mark()
        engine.update(batch, objective)
        end = watch.mark()
        step = watch.seconds(*marks)
        forward = watch.of(lambda: engine.logprobs(batch))
        if turn >= 0:
            passes.append(watch.seconds(start, end) - step)
            steps.append(step)
            forwards.append(forward)
    return {"passes": median(passes), "optimizer": median(steps), "forward": median(forwards)}


def decode_seconds(engine: NativeEngine, work: Work, turns: int) -> dict[str, float]:
    """Medians: a whole call, and one that draws a single token, most of which is the prompts' forward."""
    prompts = prompts_of(-(-work.rows // GROUP), work.decode_prompt, work.shape["vocab_size"])
    watch = Watch(engine.model.device)
    found: dict[str, float] = {}
    for name, new_tokens in (("call", work.new_tokens), ("prompts", 1)):
        sampling = SamplingParams(new_tokens, n=GROUP, ignore_eos=True)

        def run(sampling: SamplingParams = sampling) -> None:
            engine.generate(prompts, sampling, seed=0, policy_version=0)

        run(), run()
        found[name] = median(watch.of(run) for _ in range(turns))
    return found


def decode_bytes(model: Any, work: Work) -> float:
    """That the steps after the first token have to read, in bfloat16."""
    config = model.config
    weights = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2)
    column = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    columns = sum(work.decode_prompt + drawn for drawn in range(1, work.new_tokens))
    return (work.new_tokens - 1) * weights + work.rows * column * columns


def profile(run: Callable[[], Any], path: Path) -> None:
    with torch.profiler.profile() as profiler:
        run()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90))


# The whole of it


def update_rows(
    model: Any, work: Work, peaks: Mapping[str, float], turns: int, profiled: Path | None
) -> Iterator[list[str]]:
    engine, lengths = training(model, torch.bfloat16), torch.full((work.sequences,), work.response)
    batch = random_batch(lengths, group=GROUP, prompt=work.prompt)
    seconds = update_seconds(engine, batch, turns)
    if profiled is not None:
        batch = replace(batch, old_logprobs=engine.logprobs(batch))
        profile(lambda: engine.update(batch, gspo()), profiled / "cuda-update-profile.txt")
    flops, attention = useful_flops(engine.model.config, batch)
    print(f"update: {seconds}, {flops:.3e} FLOP of which attention {attention:.3e}", flush=True)
    for name, count, took in (
        ("update", flops, seconds["passes"]),
        ("forward", flops / 3, seconds["forward"]),
    ):
        shares = [f"{count / took / peak:.1%}" for peak in peaks.values()]
        step = f"{1000 * seconds['optimizer']:.1f}" if name == "update" else ""
        yield [name, f"{1000 * took:.1f}", step, f"{count / took / 1e12:.1f}", *shares]


def decode_rows(
    model: Any, work: Work, bandwidths: Mapping[str, float], turns: int, profiled: Path | None
) -> Iterator[list[str]]:
    for graphs in (True, False):
        engine = NativeEngine(model, NoText(), max_num_seqs=work.rows, dtype=torch.bfloat16)
        engine.graphs = graphs
        seconds = decode_seconds(engine, work, turns if graphs else 1)
        print(f"decoding, graphs {graphs}: {seconds}", flush=True)
        if graphs and profiled is not None:
            few = replace(work, new_tokens=min(work.new_tokens, 24))
            run = partial(decode_seconds, engine, few, 1)
            run()
            profile(run, profiled / "cuda-decode-profile.txt")
        steps = seconds["call"] - seconds["prompts"]
        tokens = work.rows * work.new_tokens
        rates = [f"{tokens / seconds['call']:.0f}", f"{1000 * steps / (work.new_tokens - 1):.2f}"]
        shares = [f"{decode_bytes(model, work) / steps / rate:.1%}" for rate in bandwidths.values()]
        yield ["yes" if graphs else "no", f"{1000 * seconds['prompts']:.0f}", *rates, *shares]


def measure(work: Work, device: torch.device, turns: int, out: Path, with_profile: bool) -> None:
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else "CPU"
    sheet = next((both for part, both in SHEETS.items() if part in name), None)
    peaks = {"of measured peak": matrix_peak(device, 8192 if on_cuda else 256)}
    bandwidths = {"of measured bandwidth": bandwidth(device, 2**31 if on_cuda else 2**22)}
    if sheet is not None:
        peaks["of data sheet"], bandwidths["of data sheet"] = sheet
    print(f"{name}: {peaks}, {bandwidths}", flush=True)
    far = agreement(device, torch.bfloat16 if on_cuda else torch.float32)
    print(f"apart: {far}", flush=True)
    if wrong := [name for name, distance in far.items() if not distance <= FURTHEST[name]]:
        raise SystemExit(f"{', '.join(wrong)} do not agree: {far}, where rounding makes up to {FURTHEST}")

    model, profiled = make_model(work.shape, device), out if with_profile else None
    updates = list(update_rows(model, work, peaks, turns, profiled))
    decoded = list(decode_rows(model, work, bandwidths, turns, profiled))
    markdown = f"""# One GPU: update and decoding

Weights of Qwen3-0.6B's shape ({sum(p.numel() for p in model.parameters()) / 1e6:.0f} M), random.

## Update, {work.sequences} sequences of {work.prompt} + {work.response} tokens

{table(["", "ms", "optimizer, ms", "TFLOP/s", *peaks], updates)}

## Decoding, {work.rows} rows, {work.decode_prompt} tokens and {work.new_tokens} more

{table(["graphs", "prompts, ms", "tokens/s", "step, ms", *bandwidths], decoded)}

## Apart

{table(["", "distance", "at most"], [[k, f"{v:.2g}", str(FURTHEST[k])] for k, v in far.items()])}"""
    here = setting(device=name, turns=turns)
    write_results("cuda", here, markdown, {"apart": far, **peaks, **bandwidths}, directory=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a very small model, to try the script")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also write which kernels took the time")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.cuda: PyTorch sees no GPU here; --tiny --device cpu tries the script", file=sys.stderr
        )
        raise SystemExit(2)
    measure(TINY if args.tiny else FULL, device, args.turns, args.out, args.profile)


if __name__ == "__main__":
    main()
