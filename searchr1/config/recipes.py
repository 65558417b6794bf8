"""Recipes: the YAMLs that come with the package.

`searchr1/recipes` is a link to `examples/searchr1/config`, where users of a clone edit them; a wheel holds the files.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from searchr1.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = PACKAGE / "recipes"
SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """Return the name of every recipe, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_config(config: str | Path) -> Path:
    """Return the YAML that `config` means: a file, or else the recipe of that name, with or without its .yaml.

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
