"""From the command line to a typed config.

Hydra composes the recipe (a YAML file, with those it builds on) and reads the values of overrides.
Every setting, of the recipe and of the command line, is then put in its place (`_Settings`): verl's older
and newer places of a setting meet in one key of the schema, and what verl has besides is accepted with a
note or refused (`verl_keys.py`). The settings meet in one untyped tree over the schema's defaults, are
resolved, and enter the typed schema key by key in `_typed`. What is wrong is collected, so that it can be
told all at once.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType
from typing import Any, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from seqrl.config.problems import Problem, raise_all
from seqrl.config.verl_keys import FOREIGN, PLACES, VALUES, foreign, place_of
from seqrl.errors import UserError

C = TypeVar("C")

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "command line"
SHORT_OPTIONS = {"-cn": "--config-name", "-cp": "--config-path", "-cd": "--config-dir"}

EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    dict[str, Any]: "a mapping, key by key",
}


@dataclass(frozen=True)
class Setting:
    """One value for one key, as it was given."""

    key: str
    """Its place in the schema."""
    value: Any
    written: str
    """The key as it was written."""
    origin: str
    """`command line` or `recipe NAME`."""

    def __str__(self) -> str:
        where = "" if self.origin == COMMAND_LINE else f" ({self.origin})"
        return f"{self.written}={_shown(self.value)}{where}"


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A config, and what there is to say of how it was given."""

    config: C
    """With the default where a value could not be read."""
    problems: list[Problem]
    notes: list[str]
    """One line for each reason why keys of verl's have no counterpart here, with those keys."""
    given: dict[str, str]
    """From each key that was set to where: `command line` or `recipe NAME`."""


@dataclass
class _Settings:
    """What is read of a recipe and the command line, setting by setting."""

    types: Mapping[str, Any]
    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    without_counterpart: dict[str, list[str]] = field(default_factory=dict)
    """From the reason to the keys."""

    def add(self, origin: str, values: Iterable[tuple[str, Any]]) -> None:
        """Puts each value in its place; one place given two values within `origin` is a problem."""
        here: dict[str, Setting] = {}
        for written, value in values:
            setting = Setting(in_schema(written, self.types), value, written, origin)
            if (kept := self._place(setting)) is None:
                continue
            before = here.get(kept.key)
            # Another place that is null was not meant.
            if before is not None and before.written != kept.written:
                if kept.value is None:
                    continue
                if before.value is not None and before.value != kept.value:
                    self.problems.append(
                        Problem(kept.key, f"{before} and {kept} are one setting; keep one of them")
                    )
            here[kept.key] = kept
        for key, setting in here.items():
            if setting.value is not None or setting.written == key or key not in self.settings:
                self.settings[key] = setting

    def _place(self, setting: Setting) -> Setting | None:
        """The setting with its value in seqrl's words, None where no key of the schema is meant."""
        key, value = setting.key, setting.value
        others = re.findall(r"[\w.]+", value) if isinstance(value, str) and "${" in value else []
        if setting.written != key and any(in_schema(other, self.types) == key for other in others):
            return None  # as verl writes it, from one place of a setting to the other
        if leaf_of(key, self.types) is not None:
            if setting.written != key and value is None:
                return None
            words = VALUES.get(key, {})
            return Setting(
                key,
                words.get(value, value) if isinstance(value, str) else value,
                setting.written,
                setting.origin,
            )
        if _is_section(key, self.types) and value is None:
            return None
        if _is_section(key, self.types):
            self.problems.append(Problem(key, f"{setting}: {key} is a section; write {key}.KEY=VALUE"))
            return None
        row = foreign(key) if is_rl(self.types) else None
        if row is None:
            self.problems.append(_unknown(setting, self.types))
        elif row.accepts(_default_of(value)):
            self.without_counterpart.setdefault(row.reason, []).append(setting.written)
        else:
            self.problems.append(Problem(key, f"{setting}: {row.reason}; {row.instead}"))
        return None


def load(schema: type[C], arguments: Sequence[str], *, default_name: str) -> C:
    """The config that `arguments` (what stands after `seqrl train`) ask for; see `read`.

    Raises UserError with a line for each option, recipe, key or value that cannot be read, and for each
    required key without a value.
    """
    loaded = read(schema, arguments, default_name=default_name)
    raise_all(loaded.problems)
    return loaded.config


def read(schema: type[C], arguments: Sequence[str], *, default_name: str) -> Loaded[C]:
    """The config that `arguments` ask for, with all that is wrong with them.

    `arguments` are overrides `key=value` (a leading `+` or `++` is allowed and changes nothing),
    `--config-name NAME` (one of our recipes, or a YAML file in the config path; else `default_name`)
    and `--config-path DIR` or `--config-dir DIR`. Text needs no quotes, `null` is None, a list is
    `[a,b]`; a single text stands for a list of one. Interpolations come back resolved.

    Raises UserError where nothing can be read at all: an unknown option, no such recipe, a recipe that is
    no YAML.
    """
    name, directory, overrides = _read_options(arguments, default_name)
    schema_type = cast(type, schema)  # mypy takes the types of dataclasses for unhashable
    types = leaf_types(schema_type)
    structured = copy.deepcopy(_structured(schema_type))
    defaults = cast(dict[str, Any], OmegaConf.to_container(structured))
    settings = _Settings(types)
    composed = _flatten(_compose(defaults, name, directory), types)
    # Most of it are the schema's defaults, which nobody has set.
    unset = dict(_flatten(defaults, types))
    settings.add(
        f"recipe {name}", ((key, value) for key, value in composed if key not in unset or unset[key] != value)
    )
    settings.add(COMMAND_LINE, _read_overrides(overrides, types, settings.problems))
    given = {key: setting.origin for key, setting in settings.settings.items()}
    # Every other default is a value as it stands, of the right type.
    open_defaults = {key for key, value in unset.items() if "${" in str(value) or value == MISSING}
    keys = open_defaults | {leaf_of(key, types) or key for key in given}
    config = cast(C, _typed(structured, _tree(defaults, settings), settings, keys))
    notes = [f"{', '.join(keys)}: {reason}" for reason, keys in settings.without_counterpart.items()]
    return Loaded(config, settings.problems, notes, given)


def to_dict(config: object) -> dict[str, Any]:
    """The config as nested plain dicts and lists."""
    return asdict(cast(Any, config))


def save_resolved(config: object, path: Path) -> None:
    """Write the whole config as YAML; `load` reads the file again as a recipe."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), encoding="utf-8")


@functools.cache
def _structured(schema: type) -> Any:
    """As OmegaConf has it, which takes four times as long to make as to copy."""
    return OmegaConf.structured(schema)


@functools.cache  # a check of one command line asks five times
def leaf_types(schema: type) -> Mapping[str, Any]:
    """Every key of `schema` that holds a value, as a dotted path, with its type."""
    leaves: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            leaves |= {f"{name}.{key}": value for key, value in leaf_types(cast(type, kind)).items()}
        else:
            leaves[name] = kind
    return leaves


def _read_options(arguments: Sequence[str], default_name: str) -> tuple[str, Path | None, list[str]]:
    """Recipe name, the user's config folder and the overrides."""
    name, directory, overrides = default_name, None, []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        option, equals, value = argument.partition("=")
        option = SHORT_OPTIONS.get(option, option)
        if option not in ("--config-name", "--config-path", "--config-dir"):
            raise UserError(
                f"unknown option {option}; there are --config-name NAME, --config-path DIR and key=value"
            )
        if not (value := value if equals else next(rest, "")):
            raise UserError(f"{option} needs a value")
        if option == "--config-name":
            name = value.removesuffix(".yaml")
        else:
            directory = Path(os.path.expanduser(value)).absolute()
            if not directory.is_dir() and directory.name == "config":
                directory = (
                    None  # verl's own folder of recipes, as its scripts name it; ours are found anyway
                )
            elif not directory.is_dir():
                raise UserError(f"{option} {value}: there is no such folder")
    return name, directory, overrides


def _compose(defaults: dict[str, Any], name: str, directory: Path | None) -> dict[str, Any]:
    """The recipe and all it builds on, as Hydra composes them, without types or resolving."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from yaml import MarkedYAMLError  # type: ignore[import-untyped]

    folders = [folder for folder in (directory, RECIPES) if folder]
    home = next((folder for folder in folders if (folder / f"{name}.yaml").is_file()), None)
    if home is None:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        raise UserError(
            f"no recipe {name!r}; there are {', '.join(known)} (--config-path DIR adds the YAML files of DIR)"
        )
    # What a recipe's `defaults: [schema]` names. Plain values: the types are checked in `_typed`,
    # where a single text may stand for a list.
    ConfigStore.instance().store("schema", defaults)
    quoted = str(RECIPES).replace("'", r"\'")
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(home), version_base="1.3"):
            # Hydra warns of a recipe without `_self_`; the recipe's own values win, as one expects.
            warnings.filterwarnings("ignore", message=".*_self_", category=UserWarning)
            composed = compose(name, overrides=[f"hydra.searchpath=['file://{quoted}']"])
        return cast(dict[str, Any], OmegaConf.to_container(composed))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}:{mark.line + 1}" if mark else f"recipe {name}"
        raise UserError(f"{where}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise UserError(f"recipe {name}: its defaults list leads back to itself") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"recipe {name}: {_one_line(error)}") from error


def _flatten(
    tree: Mapping[Any, Any], types: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The values of a composed recipe by dotted key; an empty section gives none."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        place = in_schema(key, types)
        is_mapping = isinstance(value, Mapping)
        if place in types and not (is_mapping and _is_mapping_type(types[place])):
            yield key, value
        elif is_mapping:
            yield from _flatten(value, types, f"{key}.")
        elif value is not None or leaf_of(place, types) is not None or not _is_section(place, types):
            yield key, value


def _read_overrides(
    overrides: Sequence[str], types: Mapping[str, Any], problems: list[Problem]
) -> Iterator[tuple[str, Any]]:
    """Key and value of each `key=value`; what cannot be read goes to `problems`."""
    for argument in overrides:
        try:
            key, value = _read_override(argument, types)
        except UserError as error:
            line = " ".join(str(error).split())
            problems.append(Problem(argument.partition("=")[0].lstrip("+"), line))
            continue
        if isinstance(value, Mapping):
            yield from _flatten({key: value}, types)
        else:
            yield key, value


def _read_override(argument: str, types: Mapping[str, Any]) -> tuple[str, Any]:
    key, equals, text = argument.partition("=")
    if key.startswith("~"):
        raise UserError(f"{argument}: a key cannot be taken away; write {key[1:]}=null")
    key = key.lstrip("+").strip()
    if not equals or not re.fullmatch(r"[\w.]+(?:-[\w.]+)*", key):
        raise UserError(f"cannot read the argument {argument!r}; write key=value")
    kind = types.get(in_schema(key, types), Any)
    return key, _read_value(key, text.strip(), _required(kind))


def _read_value(key: str, text: str, kind: Any) -> Any:
    """Text is taken as it stands (a file string holds `:`, `?`, `&` and `=`); the rest is Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if kind in (str, list[str]) and text.lower() != "null":
        if kind == list[str] and re.fullmatch(r"\[[^\[\]{}'\"]*\]", text):
            return [part.strip() for part in text[1:-1].split(",") if part.strip()]
        if not text.startswith(("'", '"', "[", "{")):
            if kind == list[str] and "," in text and "${" not in text:
                raise UserError(f"{key}={text}: write a list as [a,b], or quote a text with a comma: ['a,b']")
            return text
    try:
        override = OverridesParser.create().parse_override(f"value={text}")
        if not override.is_sweep_override():
            return override.value()
    except HydraException as error:
        if kind is Any:  # a key of verl's, or of an engine: its grammar is not ours
            return text
        raise UserError(
            f"{key}={text}: cannot read the value; a list is [a,b], special characters need quotes: ['a,b']"
        ) from error
    raise UserError(f"{key}={text}: one run takes one value; a list is written [a,b]")


def _tree(defaults: dict[str, Any], settings: _Settings) -> Any:
    """The defaults under all settings, untyped and unresolved."""
    tree = OmegaConf.create(defaults)
    for key, setting in settings.settings.items():
        try:
            OmegaConf.update(tree, key, setting.value, merge=False, force_add=True)
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
            settings.problems.append(Problem(key, f"{setting}: cannot read the value: {_one_line(error)}"))
    return tree


def _typed(typed: Any, tree: Any, settings: _Settings, keys: Container[str]) -> Any:
    """`typed`, a structured schema, with the values of `tree` for `keys`, resolved and of each key's type."""
    for key, kind in settings.types.items():
        if key not in keys:
            continue
        setting = settings.settings.get(key)
        where = "" if setting is None or setting.origin == COMMAND_LINE else f" ({setting.origin})"
        try:
            value = OmegaConf.select(tree, key, throw_on_missing=True)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except MissingMandatoryValue:
            settings.problems.append(Problem(key, f"{key} is required; write {key}=..."))
            continue
        except (OmegaConfBaseException, RecursionError) as error:
            if setting is not None:  # else it follows from another key, which is told
                settings.problems.append(Problem(key, f"{setting.written}{where}: {_one_line(error)}"))
            continue
        if value is None and (_is_mapping_type(kind) or get_origin(kind) is list):
            value = {} if _is_mapping_type(kind) else []
        if _required(kind) == list[str] and isinstance(value, str):
            value = [value] if value else []
        try:
            OmegaConf.update(typed, key, value, merge=False)
        except (OmegaConfBaseException, OverflowError):
            null = " or null" if kind != _required(kind) else ""
            written = key if setting is None else setting.written
            settings.problems.append(
                Problem(key, f"{written}={_shown(value)}{where}: expected {EXPECTED[_required(kind)]}{null}")
            )
    return _to_object(typed)


def _to_object(typed: Any) -> Any:
    """The dataclass; a required key without a value, which is a problem by now, reads as an empty text."""
    for key in OmegaConf.missing_keys(typed):
        OmegaConf.update(typed, key, "")
    return OmegaConf.to_object(typed)


def _required(kind: Any) -> Any:
    """The type without its `| None`."""
    parts = get_args(kind)
    return next(part for part in parts if part is not NoneType) if NoneType in parts else kind


def _is_mapping_type(kind: Any) -> bool:
    return get_origin(kind) is dict


def _default_of(value: Any) -> Any:
    """What an interpolation that is not resolved says by itself: its default, or nothing."""
    if not isinstance(value, str) or "${" not in value:
        return value
    default = re.fullmatch(r"\$\{oc\.select:[^,]+,(.*)\}", value)
    text = default[1].strip() if default else "null"
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def in_schema(key: str, types: Mapping[str, Any]) -> str:
    """The key's place in the schema, where it is another place of a setting; else the key itself."""
    return place_of(key) if is_rl(types) and key not in types else key


def is_rl(types: Mapping[str, Any]) -> bool:
    """Whether the schema is that of `seqrl train`, whose keys are verl's."""
    return "algorithm.adv_estimator" in types


def leaf_of(key: str, types: Mapping[str, Any]) -> str | None:
    """The key of the schema that this one is, or lies below where it holds a mapping; else None."""
    if key in types:
        return key
    parents = (key[:i] for i, character in enumerate(key) if character == ".")
    return next((parent for parent in parents if parent in types and _is_mapping_type(types[parent])), None)


def _is_section(key: str, types: Mapping[str, Any]) -> bool:
    return any(known.startswith(f"{key}.") for known in types)


def _shown(value: Any) -> str:
    """A value as one would write it, on one short line."""
    text = " ".join(("null" if value is None else str(value)).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(setting: Setting, types: Mapping[str, Any]) -> Problem:
    near = nearest_keys(setting.written, list(types))
    if not near and is_rl(types):
        verls = [*PLACES, *(row.key for row in FOREIGN)]
        near = nearest_keys(setting.written, [key for key in verls if not key.endswith("*")])
    hint = f"did you mean {' or '.join(near)}?" if near else "seqrl reads no key of a similar name"
    where = "" if setting.origin == COMMAND_LINE else f" ({setting.origin})"
    return Problem(setting.written, f"unknown key {setting.written}{where}; {hint}")


def nearest_keys(key: str, known: Sequence[str]) -> list[str]:
    """The known keys a writer of `key` most likely meant: the best, with its equals; none if all are far.

    The last name counts most, since sections are long and alike; leading sections may be left out.
    """
    *sections, last = key.split(".")

    def closeness(candidate: str) -> float:
        *parents, name = candidate.split(".")
        near = ".".join(parents[-len(sections) :]) if sections else ""
        return 3 * _similarity(last, name) + _similarity(".".join(sections), near)

    close = {name: closeness(name) for name in known if _similarity(last, name.split(".")[-1]) >= 0.7}
    best = max(close.values(), default=0.0)
    return [name for name, value in close.items() if value == best][:3]


def _similarity(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _one_line(error: BaseException) -> str:
    """The first line of a library's message, or of its cause's where it has none."""
    text = str(error) or str(error.__cause__ or type(error).__name__)
    return text.splitlines()[0].strip()
