"""No command line ends in a traceback: exit code 0 or 2, and every error line names what it is about.

500 command lines are drawn from real keys and misspelt ones, with all prefixes and values of right and of
wrong types: 380 go through `seqrl check` whole, in this process, the others through `train`, `eval` and
`explain`, which end before they need a model.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import seqrl.config.load as load
from seqrl.cli import main
from seqrl.config.check_keys import TRAIN_WORDS
from seqrl.config.schema import Config
from seqrl.config.verl_keys import FOREIGN, PLACES, place_of

FLAGS = list(csv.DictReader((Path(__file__).parents[2] / "docs" / "verl-flags.csv").open()))
TYPES = load.leaf_types(Config)
KEYS = sorted({*TYPES, *PLACES, *(row.key for row in FOREIGN), *(flag["key"] for flag in FLAGS)})
SEEN = {flag["key"]: [value.strip() for value in flag["values"].split("|")] for flag in FLAGS}
WORDS = sorted({word for words in TRAIN_WORDS.values() for word in words})

ODD = [
    *("", " ", "''", '""', "'", '"', "[", "]", "{", "}", "[]", "{}", "[[]]", "[1,[2,3]]", "[a,b", "a,b"),
    *("['a','b']", '["a","b"]', "[1, 2, 3]", "[null]", "{a:1}", "{a: {b: 2}}", "{a:1,b:[1,2]}", "{:}", "a:b"),
    *("null", "None", "~", "true", "False", "yes", "nan", "inf", "-inf", "1e400", "-1e400", "9" * 400),
    *("0", "-1", "-0", "1", "2", "3", "1.5", "1e-6", "3e-4", "1_000", "0x10", "1e5", "99999999999999999999"),
    *("${data.seed}", "${nothing.here}", "${", "${}", "$", "${oc.env:NO_SUCH_VARIABLE}", "${oc.env:HOME}"),
    *("${trainer.default_local_dir}", "${data}", "${trainer.seed}_${data.seed}", "a${b", "${a:b,c}", "???"),
    *(
        "ü",
        "日本語",
        "🙂",
        "\u202e",
        "a b",
        "a\tb",
        "a\nb",
        "\\",
        "\\n",
        "a=b",
        "a=b=c",
        "=",
        "==",
        "-",
        "--x",
    ),
    *("@", "#", "%s", "%", "{0}", "*", "glob(*)", "choice(1,2)", "range(1,5)", "interval(0,1)", "sort(3,2)"),
    *("str(1)", "int(x)", "!!python/object:os.system", "&a", "*a", "|", ">", "- a", "? a", "x" * 5000),
    *("/", "/no/such/file.parquet", "~/x", ".", "gspo", "vllm", "sglang", "megatron", "token-mean", "cpu"),
]
OPTIONS = [
    *(["--config-name=ppo_megatron_trainer"], ["--config-name", "dapo.yaml"], ["-cn", "gspo_dapo"]),
    *(["--config-name=nothing"], ["--config-name"], ["--config-name="], ["-cn=../../etc/passwd"]),
    *(["--config-path=config"], ["--config-path", "./config"], ["--config-path=/no/such"], ["-cp"]),
    *(["--config-dir=."], ["-cd", "/tmp"], ["--multirun"], ["-m"], ["--cfg", "job"], ["--json"], ["-x=1"]),
    *(["hydra.run.dir=x"], ["hydra/launcher=x"], ["+hydra.job.chdir=True"], ["a/b=c"], ["@a=b"], ["a@b=c"]),
]


def misspelt(draw: st.DrawFn, key: str) -> str:
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from("abcxyz._-/@ 0ü"))
    return draw(
        st.sampled_from(
            [
                *(key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]),
                *(key.upper(), key + ".", "." + key, key.replace(".", "..", 1), key.replace(".", "/")),
                *(key + ".more", key.rpartition(".")[0], key.rpartition(".")[2], letter),
            ]
        )
    )


@st.composite
def argument(draw: st.DrawFn) -> list[str]:
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.sampled_from(OPTIONS))
    if kind == 1:
        return [draw(st.sampled_from(ODD) | st.text(max_size=12))]
    key = draw(st.sampled_from(KEYS)).replace("*", draw(st.sampled_from(["enable", "a.b", "path", "*"])))
    if kind < 5:
        key = misspelt(draw, key)
    prefix = draw(st.sampled_from(["", "", "", "", "+", "++", "~", "+++", " "]))
    values = [*ODD, *WORDS, *SEEN.get(key, []) * 30]
    value = draw(
        st.sampled_from(values) | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
    )
    return [
        draw(
            st.sampled_from([f"{prefix}{key}={value}"] * 12 + [f"{prefix}{key}", f"{prefix}{key} = {value}"])
        )
    ]


@st.composite
def command_line(draw: st.DrawFn) -> list[str]:
    drawn = [draw(argument()) for _ in range(draw(st.integers(1, 6)))]
    drawn += [draw(st.sampled_from(drawn)) for _ in range(draw(st.integers(0, 1)))]
    usual = [["actor_rollout_ref.model.path=/no/model"], ["data.train_files=/no/rows.parquet"]]
    drawn += draw(st.sampled_from([usual, usual, usual, []]))
    return ["actor_rollout_ref.rollout.n=8", *(part for arguments in drawn for part in arguments)]


def said(command: list[str]) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the lines of errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("seqrl: warning: ")]
    assert all(line.startswith("seqrl: error: ") for line in lines), lines
    return code, out.getvalue(), lines


def names(arguments: list[str]) -> set[str]:
    """How a line may name what was given: an argument, an option or its value, a key or its other place."""
    found = {
        *("actor_rollout_ref.model.path", "data.train_files"),  # required
        *(" ".join(argument.split()) for argument in arguments),
        *(repr(argument) for argument in arguments),
    }
    for argument in arguments:
        key = argument.partition("=")[0].strip().lstrip("+~").strip()
        found |= {key, place_of(key), argument.partition("=")[2].strip()} | {
            load.leaf_of(place_of(key), TYPES) or key
        }
    return {name for name in found if name}


def is_named(line: str, arguments: list[str]) -> bool:
    line = " ".join(line.split())
    return any(name in line for name in names(arguments)) or line.startswith(("unknown option", "no recipe"))


@settings(max_examples=380, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(command_line())
def test_check(arguments: list[str]) -> None:
    arguments = [argument for argument in arguments if argument not in ("--help", "-h")]
    code, out, errors = said(["check", "--json", *arguments])
    assert code in (0, 2)
    said_of = {} if errors else json.loads(out)
    lines = errors or [problem["message"] for problem in said_of["problems"]]
    of_the_recipe = [row["key"] for row in said_of.get("differences", []) if "recipe" in row["where"]]
    assert bool(lines) == (code == 2)
    for line in lines:
        assert "\n" not in line and len(line) < 2000
        assert is_named(line, [*arguments, *of_the_recipe]), line


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(command_line(), st.sampled_from(["train", "eval"]))
def test_train_and_eval(arguments: list[str], command: str) -> None:
    """With no model and no data they end before they begin: always with code 2."""
    paths = (
        "actor_rollout_ref.model.path",
        "data.train_files",
        "data.val_files",
        "trainer.default_local_dir",
    )
    arguments = [argument for argument in arguments if not any(path in argument for path in paths)]
    code, _, errors = said([command, *arguments, f"{paths[0]}=/no/model", f"{paths[3]}=/proc/no/run"])
    assert code == 2 and errors


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(command_line())
def test_explain(arguments: list[str]) -> None:
    code, out, errors = said(["explain", *arguments])
    assert (code, bool(out), bool(errors)) in ((0, True, False), (2, False, True))
