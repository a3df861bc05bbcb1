"""From the command line to a typed config.

Hydra composes the recipe (a YAML file, with those it builds on) and reads the values of overrides.
Everything then meets in one untyped tree over the schema's defaults, is resolved, and enters the
typed schema key by key in `_typed`, so that recipe and command line share their checks and their errors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from seqrl.errors import UserError

C = TypeVar("C")

RECIPES = Path(__file__).parent / "recipes"

EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
}


def load(schema: type[C], arguments: Sequence[str], *, default_name: str) -> C:
    """The config that `arguments` (what stands after `seqrl train`) ask for.

    `arguments` are overrides `key=value` (a leading `+` or `++` is allowed and changes nothing),
    `--config-name NAME` (one of our recipes, or a YAML file in the config path; else `default_name`)
    and `--config-path DIR` or `--config-dir DIR`. Text needs no quotes, `null` is None, a list is
    `[a,b]`; a single text stands for a list of one. Interpolations come back resolved.

    Raises UserError, in one line, for an option, recipe, key or value that cannot be read, and for
    a required key without a value.
    """
    name, directory, overrides = _read_options(arguments, default_name)
    types = leaf_types(schema)
    origin = f" (recipe {name})"
    defaults = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(schema)))
    recipe = dict(_flatten(_compose(defaults, name, directory), types, origin))
    given = dict(_read_override(override, types) for override in overrides)
    tree = OmegaConf.create(defaults)
    for key, value in {**recipe, **given}.items():
        try:
            OmegaConf.update(tree, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={value}: cannot read the value: {_one_line(error)}") from error
    return _typed(schema, tree, types, dict.fromkeys(recipe.keys() - given.keys(), origin))


def to_dict(config: object) -> dict[str, Any]:
    """The config as nested plain dicts and lists."""
    return asdict(cast(Any, config))


def save_resolved(config: object, path: Path) -> None:
    """Write the whole config as YAML; `load` reads the file again as a recipe."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), encoding="utf-8")


def leaf_types(schema: type) -> dict[str, Any]:
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
        if option not in ("--config-name", "--config-path", "--config-dir"):
            raise UserError(
                f"unknown option {option}; there are --config-name NAME, --config-path DIR and key=value"
            )
        if not (value := value if equals else next(rest, "")):
            raise UserError(f"{option} needs a value")
        if option == "--config-name":
            name = value.removesuffix(".yaml")
        else:
            directory = Path(value).expanduser().absolute()
            if not directory.is_dir():
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
    tree: Mapping[Any, Any], types: Mapping[str, Any], origin: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The values of a composed recipe by dotted key; an empty section gives none."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in types:
            yield key, value
        elif not _is_section(key, types):
            raise _unknown(key, types, origin)
        elif isinstance(value, Mapping):
            yield from _flatten(value, types, origin, f"{key}.")
        elif value is not None:
            raise UserError(f"{key}={value!r}{origin}: {key} is a section, set the keys inside it")


def _read_override(argument: str, types: Mapping[str, Any]) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    key, equals, text = argument.partition("=")
    key = key.lstrip("+").strip()
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise UserError(f"cannot read the argument {argument!r}; write key=value")
    if _is_section(key, types):
        raise UserError(f"{argument}: {key} is a section; write {key}.KEY=VALUE")
    if key not in types:
        raise _unknown(key, types)
    return key, _read_value(key, text.strip(), _required(types[key]))


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
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if not override.is_sweep_override():
            return override.value()
    except HydraException as error:
        raise UserError(
            f"{key}={text}: cannot read the value; a list is [a,b], special characters need quotes: ['a,b']"
        ) from error
    raise UserError(f"{key}={text}: one run takes one value; a list is written [a,b]")


def _typed(schema: type[C], tree: Any, types: Mapping[str, Any], origins: Mapping[str, str]) -> C:
    """`tree` resolved, with every value converted to its key's type; `origins` says where a value stands."""
    typed = OmegaConf.structured(schema)
    for key, kind in types.items():
        try:
            value = OmegaConf.select(tree, key, throw_on_missing=True)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except MissingMandatoryValue as error:
            raise UserError(f"{key} is required; write {key}=...") from error
        except OmegaConfBaseException as error:
            raise UserError(f"{key}{origins.get(key, '')}: {_one_line(error)}") from error
        if _required(kind) == list[str] and isinstance(value, str):
            value = [value] if value else []
        try:
            OmegaConf.update(typed, key, value, merge=False)
        except OmegaConfBaseException as error:
            null = " or null" if kind != _required(kind) else ""
            shown = "null" if value is None else value
            raise UserError(
                f"{key}={shown}{origins.get(key, '')}: expected {EXPECTED[_required(kind)]}{null}"
            ) from error
    return cast(C, OmegaConf.to_object(typed))


def _required(kind: Any) -> Any:
    """The type without its `| None`."""
    parts = get_args(kind)
    return next(part for part in parts if part is not NoneType) if NoneType in parts else kind


def _is_section(key: str, types: Mapping[str, Any]) -> bool:
    return any(known.startswith(f"{key}.") for known in types)


def _unknown(key: str, types: Mapping[str, Any], origin: str = "") -> UserError:
    near = nearest_keys(key, list(types))
    hint = f"did you mean {' or '.join(near)}?" if near else "seqrl reads no key of a similar name"
    return UserError(f"unknown key {key}{origin}; {hint}")


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
