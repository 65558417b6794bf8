"""From a YAML or a recipe's name and overrides to a typed `Config`; every problem is reported, not only the first."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from searchr1.config.choices import dataclass_of, literal_values, not_one_of, options
from searchr1.config.overrides import Override, quoted, read_override
from searchr1.config.retired import explain_retired, take_retired
from searchr1.config.rlinf import Note, is_rlinf, translate
from searchr1.config.rlinf_keys import KEYS, READ
from searchr1.config.schema import ALIASES, Config
from searchr1.config.suggestions import explain_unknown
from searchr1.config.yaml_bounds import require_bounded, require_bounded_references
from searchr1.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = PACKAGE / "recipes"
SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """Return the name of every recipe, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(config: str | Path) -> Path:
    """Return the path of the YAML that `config` names: a file, or else the recipe of that name, with or without its .yaml.

    Raises:
        UserError: neither exists, or the file's name does not end in .yaml.
    """
    path = Path(config)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(path, "a configuration's name ends in .yaml")
        return path
    if path.name != str(config):  # a path with folders, or none at all
        raise UserError(path, "no such file; give the path of a YAML, or a recipe's name without folders")
    names = recipe_names()
    suffix = ".yaml" if path.suffix == ".yaml" else ""
    name = path.name.removesuffix(suffix)
    if name in names:
        return RECIPES / f"{name}.yaml"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}{suffix}?" if close else ""
    raise UserError(path, f"no such file; give the path of a YAML or a recipe: {', '.join(names)}{hint}")


def config_help(example: str) -> str:
    """Return the help text of a command's argument that names a configuration."""
    return f"path of a YAML, or a recipe's name, for instance {example}; an unknown name prints all recipes"


def package_data(name: str) -> str:
    """Return the path of a file or folder that comes with the package, given relative to it."""
    return str(PACKAGE / name)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return value


RESOLVERS = {
    "subtract": lambda a, b: a - b,
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: _number(a) * _number(b),  # a text times a billion is no value
    "divide": lambda a, b: a / b,
    "int_div": lambda a, b: a // b,
    "not": lambda a: not a,
    "package_data": package_data,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration."""

    key: str
    """Full dotted key."""
    message: str
    """What is wrong and what to do."""

    @classmethod
    def of(cls, error: UserError, key: str = "") -> Problem:
        """Return the problem that an error describes; `key` is used if the error names none."""
        return cls(error.key or key, error.message)

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(UserError):
    """A configuration with problems."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in problems)]))
        self.problems = list(problems)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML (Hydra's `defaults` included), apply `key=value` overrides, and check names and types.

    `path` is a file or the name of a recipe (`searchr1/config/load.py`).
    A tree that carries RLinf's marks is read as RLinf reads it (`searchr1/config/rlinf.py`). `Config.notes` lists
    the keys that are ignored, renamed or set, one line each.

    Raises:
        ConfigError: unknown keys, wrong types, unresolvable values.
        UserError: no such file, or not YAML.
    """
    read = [read_override(override) for override in overrides]
    tree = _compose(find_config(path), read)
    problems: list[Problem] = []
    values = _resolve(tree, problems)
    named = [override.key for override in read]
    notes = [Note("ignored", key, "is a setting of Hydra's launcher") for key in named if key.startswith("hydra.")]
    known = list(known_keys())
    if is_rlinf(values, named):
        known += [*KEYS, *READ]
        translated, rejected = translate(values, named)
        notes += translated
        problems += [Problem(key, message) for key, message in rejected]
    _rename_aliases(values, problems)
    taken = take_retired(values)
    config: Config = _build(Config, values, "", problems, known)
    for key, text, is_problem in explain_retired(taken, config):
        if is_problem:
            problems.append(Problem(key, text))
        else:
            notes.append(Note("ignored", key, text))
    if problems:
        written = {override.key: override.text for override in read}
        raise ConfigError(str(path), [_with_advice(problem, written) for problem in problems])
    config.given = frozenset(leaves(values))
    config.notes = [str(note) for note in sorted(notes)]
    return config


def load_for_command(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration; print a line on standard error for each key that is ignored, renamed or set.

    Raises:
        UserError: as `load_config`.
    """
    config = load_config(path, overrides)
    for note in config.notes:
        print(note, file=sys.stderr)
    return config


def build_config(values: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """Build a configuration from plain values and defaults; return it with every problem."""
    problems: list[Problem] = []
    return _build(Config, values, "", problems, list(known_keys())), problems


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values into `{dotted key: value}`; an empty section is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def save_config(config: Config, path: Path) -> None:
    """Write the whole tree, defaults included; `load_config` reads it back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))), encoding="utf-8")


def given_keys(config: Config) -> set[str]:
    """Return the keys that the YAML and the overrides set, by their names in the schema."""
    return set(config.given)


def _with_advice(problem: Problem, written: dict[str, str]) -> Problem:
    """Return a problem with advice on how to quote the value, if an override was read as another type."""
    text = written.get(problem.key)
    if text is None:
        return problem
    if "interpolation" in problem.message.lower() or problem.message.startswith("expects text"):
        return Problem(problem.key, f"{problem.message}; a text as it stands is written {quoted(problem.key, text)}")
    if problem.message.startswith("expects a list") and text.strip()[:1] != "[":
        return Problem(problem.key, f"{problem.message}; a list is written {shlex.quote(f'{problem.key}=[{text}]')}")
    return problem


def _compose(path: Path, overrides: Sequence[Override]) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    require_bounded(path)
    for name, function in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(path.resolve().parent), version_base="1.3"):
            tree = compose(path.stem, overrides=[override.hydra for override in overrides])
        require_bounded_references(path, OmegaConf.to_container(tree, resolve=False))
        return tree
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_hydra_problem(path, overrides, str(error))) from error
    except UserError:
        raise
    except Exception as error:  # the YAML parser's own errors have no common base outside the parser
        raise UserError(path, f"not readable as YAML: {error}") from error


def _hydra_problem(path: Path, overrides: Sequence[Override], message: str) -> str:
    """Return the text for an error of Hydra, reworded where an override is its cause."""
    for override in overrides:
        if repr(override.key) in message and message.startswith("Could not append"):
            return f"{override.key}: {path} sets it already; leave the + out"
        named = repr(override.key) in message or f"'{override.key}=" in message
        if named and message.startswith("Could not delete"):
            return f"{override.key}: cannot be removed from {path} ({message.partition('. ')[2].strip()}); leave it out"
    return f"{path}: {message}"


def _resolve(tree: DictConfig, problems: list[Problem]) -> dict[str, Any]:
    """Return plain values; add a problem for each interpolation that fails."""

    def walk(node: Any, prefix: str) -> Any:
        if OmegaConf.is_dict(node):
            plain = {}
            for name in node:
                key = f"{prefix}{name}"
                try:
                    plain[str(name)] = walk(node[name], f"{key}.")
                except OmegaConfBaseException as error:
                    problems.append(Problem(key, str(error).splitlines()[0]))
            return plain
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_list(node) else node

    result: dict[str, Any] = walk(tree, "")
    return result


def _rename_aliases(values: dict[str, Any], problems: list[Problem]) -> None:
    for old, new in ALIASES.items():
        section, _, name = old.rpartition(".")
        holder = values.get(section)
        if isinstance(holder, dict) and name in holder:
            if new.rpartition(".")[2] in holder:
                problems.append(Problem(old, f"is the old name of {new}, which is set too; keep one"))
            holder[new.rpartition(".")[2]] = holder.pop(name)


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield every key of the schema, sections included."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        inner = dataclass_of(hints[field.name])
        if inner is not None:
            yield from known_keys(inner, f"{prefix}{field.name}.")


def _build(cls: type, values: Any, prefix: str, problems: list[Problem], known: Sequence[str]) -> Any:
    """Return an instance of dataclass `cls` from plain values; `known` are the keys to suggest for unknown ones."""
    if not isinstance(values, dict):
        problems.append(Problem(prefix.rstrip("."), f"expects a section with keys, found {values!r}"))
        return cls()
    hints = typing.get_type_hints(cls)
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if name not in hints:
            problems += [Problem(leaf, explain_unknown(leaf, known)) for leaf in leaves({key: value})]
            continue
        inner = dataclass_of(hints[name])
        if inner is not None and not (value is None and type(None) in typing.get_args(hints[name])):
            chosen[name] = _build(inner, value, key + ".", problems, known)
        else:
            try:
                chosen[name] = _convert(value, hints[name])
            except ValueError as error:
                problems.append(Problem(key, str(error)))
    return cls(**chosen)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` converted to `hint`; booleans are not converted to numbers, nor numbers to text."""
    if hint is Any:
        return value
    items = typing.get_args(hint)[0] if typing.get_origin(hint) is list else None
    if isinstance(value, list) and literal_values(items):
        return [_convert(item, items) for item in value]
    if allowed := literal_values(hint):
        if value in allowed:
            return value
        raise ValueError(not_one_of(value, allowed))
    for option in options(hint):
        try:
            return _convert_one(value, option)
        except ValueError:
            continue
    expected = " or ".join(_describe(option) for option in options(hint))
    raise ValueError(f"expects {expected}, found {value!r}")


def _describe(option: Any) -> str:
    origin = typing.get_origin(option)
    if origin is list:
        return f"a list of {_describe(typing.get_args(option)[0])}"
    if origin is typing.Literal:
        return f"names ({', '.join(typing.get_args(option))})"
    return "a mapping" if origin is dict else _NAMES.get(option, str(option))


def _convert_one(value: Any, option: Any) -> Any:
    origin = typing.get_origin(option)
    if origin is list and isinstance(value, list):
        return [_convert(item, typing.get_args(option)[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return value
    if option is type(None) and value is None:
        return None
    if option is bool and isinstance(value, bool):
        return value
    if option is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if option is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        return float(value)  # YAML 1.1 reads 1e-6 as text
    if option is str and isinstance(value, str):
        return value
    raise ValueError
