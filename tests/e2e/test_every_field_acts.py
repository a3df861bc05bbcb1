"""Every key acts: set to another value, something that a user can see is another.

`every_field.py` names for each key another value, what has to change, and settings under which it matters.
That a run's outcome is the same when nothing is changed is shown, too.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from every_field import (
    BY_TOKENS,
    CONTINUED,
    DYNAMIC,
    HELD_OUT,
    IN_LOSS,
    LOSS,
    REMOTE,
    REWARD,
    SAMPLED,
    SFT,
    TRAIN,
    A,
    M,
    R,
)
from transformers import dynamic_module_utils

from seqrl.cli import run_sft, run_train
from seqrl.config.check import no_effect, problems, sft_no_effect, sft_problems
from seqrl.config.check_keys import value_of
from seqrl.config.load import leaf_types, load
from seqrl.config.place import place
from seqrl.config.plan import plan
from seqrl.config.schema import Config, SFTConfig
from seqrl.errors import UserError
from seqrl.native import forward as native
from seqrl.report.files import METRICS, read_rows
from seqrl.rewards import make_reward
from seqrl.rollout.rows import DecodedRows
from seqrl.tiny import CHAT_TEMPLATE, make_tokenizer, write_tiny_model
from seqrl.types import Prompt, Rollout

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 16,
}
OWN = '''\
"""Reward functions: of what is judged, a part each, so that a change shows in the metrics."""

import os
import time


def compute_score(data_source, solution_str, ground_truth, extra_info, scale=1.0, log=None):
    if log:
        time.sleep(0.02)
        with open(log, "a") as file:
            print(os.getpid(), file=file)
    letters = sum(char.isalpha() for char in solution_str) / 12
    digits = sum(char.isdigit() for char in solution_str) / 12
    parts = {"letters": letters, "digits": digits, "truth": len(str(ground_truth)), "alike": 1}
    return {"score": scale * (letters + digits + 0.01), "source": len(data_source), **parts}


def other(data_source, solution_str, ground_truth, extra_info):
    return len(solution_str)


def slow(data_source, solution_str, ground_truth, extra_info):
    time.sleep(0.6 * ("4" in ground_truth))
    return sum(char.isalnum() for char in solution_str)


def large(data_source, solution_str, ground_truth, extra_info):
    bytes(2**28 if "4" in ground_truth else 1)
    return sum(char.isalnum() for char in solution_str)


def failing(data_source, solution_str, ground_truth, extra_info):
    return sum(char.isalnum() for char in solution_str) / ("4" not in ground_truth)
'''
OWN_CODE = """\
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


class Own(Qwen3MoeConfig):
    def __init__(self, *values, **named):
        print("code of its own")
        super().__init__(*values, **named)


class OwnModel(Qwen3MoeForCausalLM):
    config_class = Own
"""
PROGRAM = """\
```python
import socket
socket.create_connection(("127.0.0.1", PORT))
print(4)
```"""


@dataclass
class Seen:
    """What a user sees of a command."""

    refused: list[str] = field(default_factory=list)
    """The lines of errors."""
    no_effect: list[str] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of each step, but for its timing."""
    files: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    """And warned, but for seconds."""
    forwards: dict[str, int] = field(default_factory=dict)
    """Of the training engine, by the class of the module: more where there are more micro-batches."""
    decoded: dict[int, int] = field(default_factory=dict)
    """Of the rollout engine: how often it took so many rows forward."""
    judges: int = 0
    """Processes that judged."""
    program: str = ""
    """What became of a program that wants the network."""
    requests: list[int] = field(default_factory=list)
    """What the endpoint saw: how many requests, how many at once."""


WITHOUT_A_RUN = ("no_effect", "plan")


def test_every_key_has_a_row() -> None:
    assert set(TRAIN) == set(leaf_types(Config))
    assert set(SFT) == set(leaf_types(SFTConfig))


@pytest.mark.parametrize("key", TRAIN)
def test_train(see: Callable[..., Seen], key: str) -> None:
    _acts(see, Config, key, *TRAIN[key])


@pytest.mark.parametrize("key", SFT)
def test_sft(see: Callable[..., Seen], key: str) -> None:
    _acts(see, SFTConfig, key, *SFT[key])


def _acts(
    see: Callable[..., Seen], schema: type, key: str, value: Any, change: str, settings: dict[str, Any]
) -> None:
    runs = change not in WITHOUT_A_RUN
    before, after = see(schema, settings, runs), see(schema, {**settings, key: value}, runs)
    was, is_now = asdict(before)[change], asdict(after)[change]
    assert was != is_now, f"{key}={value} changes nothing"
    if change in ("refused", "no_effect"):
        new = [line for line in is_now if line not in was]
        assert not new or any(key.rpartition(".")[2] in line for line in new), "the key is named"
    elif runs:
        assert not (before.refused or after.refused)
        assert not any(_is_named(key, line) for line in after.no_effect)


def _is_named(key: str, line: str) -> bool:
    """Whether a line of `no_effect` is of this key; keys of one section share a line."""
    section, _, name = key.rpartition(".")
    said = re.split("ha(?:s|ve) no effect", line)[0]
    return f"{key}=" in said or (said.startswith(f"{section}: ") and f" {name}=" in said)


@pytest.mark.parametrize(
    ("schema", "settings"),
    [
        *((Config, world) for world in ({}, SAMPLED, IN_LOSS, BY_TOKENS, DYNAMIC, CONTINUED, REMOTE)),
        *((SFTConfig, world) for world in ({}, HELD_OUT)),
    ],
)
def test_the_same_settings_give_the_same_outcome(
    see: Callable[..., Seen], schema: type, settings: dict[str, Any]
) -> None:
    """Else any key would seem to act."""
    first, again = (see(schema, settings, True, afresh=afresh) for afresh in (False, True))
    chance = {"requests": 0}  # how many meet
    assert {**asdict(first), **chance} == {**asdict(again), **chance}


@pytest.fixture(scope="module")
def see(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Seen]]:
    """What is seen of a command under some settings; each is run once."""
    files = tmp_path_factory.mktemp("files")
    _write_files(files)
    base = {Config: _base_train(), SFTConfig: _base_sft()}
    seen: dict[str, Seen] = {}

    def look(schema: type, settings: Mapping[str, Any], runs: bool, *, afresh: bool = False) -> Seen:
        name = repr((schema, sorted(settings.items(), key=str), runs))
        if afresh or name not in seen:
            place = tmp_path_factory.mktemp("place")
            for file in files.iterdir():
                (place / file.name).symlink_to(file)
            with contextlib.chdir(place), _endpoint() as server:
                seen[name] = _seen(base[schema], settings, runs, server)
        return seen[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield look


def _base_train() -> Config:
    return load(
        Config,
        [
            f"{M}.path=model",
            "data.train_files=rows.jsonl",
            "data.train_batch_size=4",
            "data.max_prompt_length=64",
            "data.max_response_length=10",
            f"{A}.ppo_mini_batch_size=2",
            f"{A}.optim.lr=1e-3",
            f"{LOSS}=gspo",
            f"{R}.n=4",
            f"{REWARD}.custom_reward_function.path=own.py",
            f"{A}.checkpoint.save_contents=[model]",
            "trainer.default_local_dir=run",
            "trainer.total_training_steps=2",
        ],
        default_name="ppo_trainer",
    )


def _base_sft() -> SFTConfig:
    arguments = [
        "model.path=model",
        "data.train_files=rows.jsonl",
        "data.train_batch_size=4",
        "data.max_response_length=6",
        "custom_reward_function.path=own.py",
        "optim.lr=1e-3",
        "trainer.default_local_dir=run",
        "trainer.total_training_steps=3",
    ]
    return load(SFTConfig, arguments, default_name="sft_trainer")


def _changed(config: Any, settings: Mapping[str, Any], server: str) -> Any:
    config = copy.deepcopy(config)
    for key, value in settings.items():
        if key == "FIRST":
            continue
        section, _, name = key.rpartition(".")
        if isinstance(value, str):
            value = value.replace("http://SERVER", server)
        assert hasattr(value_of(config, section), name), key
        setattr(value_of(config, section), name, value)
    return config


def _seen(base: Any, settings: Mapping[str, Any], runs: bool, server: _Endpoint) -> Seen:
    config = _changed(base, settings, server.url)
    if "FIRST" in settings:
        earlier = _changed(
            base, {"trainer.save_freq": 1, "trainer.total_training_steps": settings["FIRST"]}, ""
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run_train(earlier, again="")
    seen = Seen()
    if isinstance(config, Config):
        placed = place(config)
        seen.refused = [problem.message for problem in (*problems(placed.config), *placed.problems)]
        seen.no_effect, seen.plan = no_effect(placed.config), plan(config, 100).lines()
        config = placed.config
    else:
        seen.refused, seen.no_effect = [p.message for p in sft_problems(config)], sft_no_effect(config)
    if runs and not seen.refused:
        _run(config, seen)
        seen.requests = [server.requests, server.most_at_once]
        if isinstance(config, Config) and config.reward.code.enable:
            seen.program = _verdict(config, server.server_port)
    return seen


def _run(config: Any, seen: Seen) -> None:
    out, warnings, logger = io.StringIO(), _Warnings(), logging.getLogger("seqrl")
    forwards: Counter[str] = Counter()
    decoded: Counter[int] = Counter()
    draw, add_norm = DecodedRows.draw, native.add_norm

    def counted(self: DecodedRows, rows: slice, logits: Any) -> None:
        decoded[len(logits)] += 1
        draw(self, rows, logits)

    def counted_norm(x: Any, *rest: Any) -> Any:
        forwards[f"norm of {len(x)}"] += 1
        return add_norm(x, *rest)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: forwards.update([type(module).__name__])
    )
    logger.addHandler(warnings)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(DecodedRows, "draw", counted)
            patch.setattr(native, "add_norm", counted_norm)
            run_train(config, again="") if isinstance(config, Config) else run_sft(config)
    except UserError as error:
        seen.refused = str(error).splitlines()
    finally:
        hook.remove()
        logger.removeHandler(warnings)
    lines = [*out.getvalue().splitlines(), *warnings.lines]
    seen.printed = [re.sub(r"[\d.]+ s\b", "", line) for line in lines]
    seen.forwards, seen.decoded = dict(forwards), dict(decoded)
    here = [path for path in Path().iterdir() if not path.is_symlink()]
    seen.files = sorted(str(file) for path in here for file in path.rglob("*"))
    for path in here:
        if (path / METRICS).exists():
            seen.metrics = [_untimed(row) for row in read_rows(path / METRICS)]
    if Path("pids").exists():
        seen.judges = len({*Path("pids").read_text().split()})


def _verdict(config: Config, port: int) -> str:
    truth = {"inputs": [""], "outputs": ["4"]}
    prompt = Prompt("row", "codecontests", (), truth, {}, ())
    program = PROGRAM.replace("PORT", str(port))
    judged = make_reward(config.reward)
    try:
        judged.check([prompt])
        (reward,) = judged([Rollout(prompt, 0, torch.zeros(0), torch.zeros(0), program, True, 0)])
    except UserError:
        return "refused"
    finally:
        judged.close()
    return reward.why


def _untimed(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(("timing", "perf/"))}


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _Endpoint(ThreadingHTTPServer):
    """Judges by the length of a response; under `/unwilling` only from the second request on."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = self.now = self.most_at_once = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: _Endpoint

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            server.requests, server.now = server.requests + 1, server.now + 1
            server.most_at_once = max(server.most_at_once, server.now)
            unwilling = self.path == "/unwilling" and server.requests == 1
        row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.02)
        with server.lock:
            server.now -= 1
        body = json.dumps({"score": len(row["solution_str"])}).encode()
        self.send_response(503 if unwilling else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def _endpoint() -> Iterator[_Endpoint]:
    with _Endpoint() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def _write_files(files: Path) -> None:
    template = CHAT_TEMPLATE + "{% if enable_thinking %}think{% endif %}"
    for name, seed in (("model", 1), ("other_model", 2), ("model_with_code", 1)):
        write_tiny_model(files / name, seed=seed, **SMALL)
        (files / name / "chat_template.jinja").write_text(template)
    settings = json.loads((files / "model_with_code" / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own_code.Own", "AutoModelForCausalLM": "own_code.OwnModel"}
    (files / "model_with_code" / "config.json").write_text(json.dumps(settings))
    (files / "model_with_code" / "own_code.py").write_text(OWN_CODE)
    _write_dense(files / "dense_model")
    (files / "own.py").write_text(OWN)
    (files / "other.py").write_text(OWN.replace("0.01", "0.02").replace("/ 12", "/ 7"))
    rows = [_row(i) for i in range(12)]
    for name, written in (("rows", rows), ("more", [_row(i) for i in range(40, 48)]), ("val", rows[:4])):
        (files / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in written))
    (files / "broken.jsonl").write_text('{"data_source": "gsm8k", "prompt": null}\n')
    tests = json.dumps({"inputs": [""], "outputs": ["4"]})
    programs = [
        {**row, "data_source": "codecontests", "reward_model": {"ground_truth": tests}} for row in rows
    ]
    (files / "programs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in programs))


def _row(i: int) -> dict[str, Any]:
    text = f"What is {i} plus {i}" + " plus 1" * (i % 3) + "?"
    return {
        "data_source": "openai/gsm8k",
        "kind": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "question": f"Say {i}",
        "answer": f"the answer is {2 * i}",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"index": i},
    }


def _write_dense(directory: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    sizes = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=len(tokenizer), intermediate_size=16, num_key_value_heads=1, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
