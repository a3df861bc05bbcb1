"""`seqrl explain KEY [arguments]`: what a key means, who reads it, and its value under these arguments."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from functools import cache, reduce
from pathlib import Path

from seqrl.check_command import wrapped
from seqrl.config.check import no_effect, problems
from seqrl.config.check_keys import STRATEGIES, TRAIN_WORDS, shown, value_of
from seqrl.config.engine_keys import idle_engine_keys
from seqrl.config.keys import Key, describe
from seqrl.config.load import leaf_of, leaf_types, nearest_keys, read
from seqrl.config.loss_keys import LOSS_PARAMETERS, PARAMETER_KEYS, keys_read
from seqrl.config.place import place
from seqrl.config.problems import Problem
from seqrl.config.schema import Config
from seqrl.config.verl_keys import ANY, FOREIGN, PLACES, foreign, other_places, place_of
from seqrl.errors import UserError

SOURCE = Path(__file__).parent
NOT_READERS = (
    *("config/advice", "config/check", "config/engine_keys", "config/keys", "config/load", "config/plan"),
    *("config/schema", "config/verl_keys", "check_command", "explain_command"),
)
"""Where keys are written down and judged, not read."""


def run(arguments: Sequence[str]) -> int:
    """Prints what there is to say of one key, of a section, or of a key of verl's; returns 0.

    Raises UserError for a key that nobody knows, with the nearest right name, and for arguments that cannot
    be read at all.
    """
    if not arguments:
        raise UserError("explain takes a key: seqrl explain actor_rollout_ref.actor.clip_ratio_low")
    asked, *rest = arguments
    key = asked.partition("=")[0].lstrip("+")
    print("\n".join(_explained(key, rest)))
    return 0


def _explained(key: str, arguments: Sequence[str]) -> Iterator[str]:
    described = {row.name: row for row in describe(Config)}
    place, types = PLACES.get(f"{key}.*", place_of(key)).removesuffix(".*"), leaf_types(Config)
    if place != key:
        yield f"{key} is another place of {place}"
    if leaf := leaf_of(place, types):
        yield from _of_a_key(described[leaf], place, arguments)
    elif inside := [row for name, row in described.items() if name.startswith(f"{place}.")]:
        yield from _of_a_section(place, inside)
    elif row := foreign(key):
        yield f"{key}: a key of verl's without a counterpart here"
        yield from _item("why", row.reason)
        if row.accepted is ANY:
            yield from _item("accepted", "any value, without effect")
        else:
            accepted = " or ".join(["null", *(shown(value) for value in row.accepted)])
            yield from _item("accepted", f"{accepted}; for any other value: {row.instead}")
    else:
        verls = [*PLACES, *(row.key for row in FOREIGN)]
        near = nearest_keys(key, [*types, *(name for name in verls if not name.endswith("*"))])
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "`seqrl explain SECTION` lists a section's keys"
        )
        raise UserError(f"unknown key {key}; {hint}")


def _of_a_section(section: str, rows: Sequence[Key]) -> Iterator[str]:
    yield f"{section}: {len(rows)} keys"
    for row in rows:
        name = row.name.removeprefix(f"{section}.")
        yield f"  {name}={row.default}"
        yield from wrapped(row.text, " " * 6, " " * 6)


def _of_a_key(row: Key, key: str, arguments: Sequence[str]) -> Iterator[str]:
    yield key
    yield from wrapped(row.text, "  ", "  ")
    yield from _item("type", row.type)
    yield from _item("default", row.default)
    if row.name in TRAIN_WORDS:
        yield from _item("words", ", ".join(TRAIN_WORDS[row.name]))
    yield from _item("read by", ", ".join(readers(row.name)))
    yield from _item("matters to", "; ".join(_matters_to(row.name)))
    yield from _item("in verl also", ", ".join(other_places(key)))
    if arguments:
        yield from _under(row.name, key, arguments)


def _under(leaf: str, key: str, arguments: Sequence[str]) -> Iterator[str]:
    """The value that the arguments give, and what is said of it."""
    loaded = read(Config, arguments, default_name="ppo_trainer")
    origin = loaded.given.get(key, loaded.given.get(leaf, "default"))
    yield from _item("value here", f"{shown(value_of(loaded.config, leaf))} ({origin})")
    found: list[Problem] = [*loaded.problems, *problems(loaded.config, loaded.problems)]
    for line in [problem.message for problem in found if problem.key == key]:
        yield from _item("problem", line)
    section, _, name = leaf.rpartition(".")
    for line in no_effect(place(loaded.config).config):
        if f"{leaf}=" in line or (line.startswith(f"{section}: ") and f" {name}=" in line):
            yield from _item("no effect", line)


def readers(key: str) -> list[str]:
    """The modules in which a key of the schema is read: as `SECTION.NAME`, as `config.NAME` where the module
    knows the section's class, or by its whole name. A loss is given its settings by the objective."""
    if any(key in keys for keys in PARAMETER_KEYS.values()):
        return ["training/objective.py, for the loss"]
    *sections, name = key.split(".")
    section_class = type(reduce(getattr, sections, Config())).__name__
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        module, text = path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8")
        if name not in text or module.startswith(NOT_READERS):
            continue
        owners = {sections[-1], "config"} if section_class in text else {sections[-1]}
        if any(_reads(node, name, owners, key) for node in _nodes(path)):
            found.append(module)
    return found


@cache
def _nodes(path: Path) -> list[ast.AST]:
    """Those of a module that may read a key."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.Attribute | ast.Constant)]


def _reads(node: ast.AST, name: str, owners: Collection[str], key: str) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == name and _last_name(node.value) in owners
    return isinstance(node, ast.Constant) and node.value == key


def _last_name(node: ast.AST) -> str:
    """`optim` of `self._config.optim`; a leading underscore is not part of the name."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.lstrip("_")


def _matters_to(key: str) -> Iterator[str]:
    """The losses and engines that read it, where not all do."""
    if any(key in keys for keys in PARAMETER_KEYS.values()):
        losses = [loss for loss in LOSS_PARAMETERS if key in keys_read(loss)]
        yield f"loss_mode {', '.join(losses)}"
    strategies = [name for name in STRATEGIES if not _is_idle(key, strategy=name)]
    if 0 < len(strategies) < len(STRATEGIES):
        yield f"strategy {', '.join(strategies)}"
    engines = TRAIN_WORDS["actor_rollout_ref.rollout.name"]
    reading = [name for name in engines if not _is_idle(key, rollout=name)]
    if 0 < len(reading) < len(engines):
        yield f"rollout engine {', '.join(reading)}"
    if all(_is_idle(key, strategy=name, gpus=1) and not _is_idle(key, strategy=name) for name in strategies):
        yield "several devices"


def _is_idle(key: str, *, strategy: str = "fsdp", rollout: str = "vllm", gpus: int = 8) -> bool:
    config = Config()
    config.actor_rollout_ref.actor.strategy, config.actor_rollout_ref.rollout.name = strategy, rollout
    config.actor_rollout_ref.actor.use_kl_loss = True
    config.trainer.n_gpus_per_node = gpus
    return any(holds and key in keys for holds, _, keys in idle_engine_keys(config))


def _item(what: str, text: str) -> list[str]:
    return wrapped(text, f"  {what:<14}", " " * 16) if text else []
